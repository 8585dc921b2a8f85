# Sourced by the *.sbatch files beside it. Runs a launcher in the background, so that bash hears Slurm's warnings; lets
# the run save before the job ends; and requeues the job until the run is done or makes no progress.
#   supervise RUN_DIRECTORY LAUNCHER [WORD …]
# The same lines stand in the scripts that `hpclr submit` writes.

supervise() {
    run=$1
    shift
    mkdir -p "$run/logs"
    HPCLR_LAUNCH=$(mktemp -d "$run/logs/.launch-XXXXXXXX")      # here hpclr says which attempt it made, or why none
    HPCLR_DEADLINE=$(deadline)
    export HPCLR_LAUNCH HPCLR_DEADLINE
    [ -n "$HPCLR_DEADLINE" ] || unset HPCLR_DEADLINE
    trap 'signalled=1; ask_to_stop' USR1 TERM
    "$@" &
    signalled=1 code=0
    while [ $signalled = 1 ]; do                                # a signal ends `wait`, not the launcher
        signalled=0 code=0
        wait $! || code=$?
    done
    trap '' USR1 TERM
    finish "$(outcome "$code")"
}

# When the job must end, in seconds since 1970. Older Slurms do not set SLURM_JOB_END_TIME; jobs may have no limit.
deadline() {
    local end
    if [ -n "${SLURM_JOB_END_TIME:-}" ]; then
        echo "$SLURM_JOB_END_TIME"
    elif end=$(squeue -h -j "$SLURM_JOB_ID" -o %e) && [ -n "$end" ]; then
        date -d "$end" +%s 2>/dev/null || true
    fi
}

# All processes look for this file between steps. One that is there already has the first word.
ask_to_stop() {
    [ ! -e "$run/STOP" ] || return 0
    echo 'requeue the time limit is near, or the job is preempted' >"$run/.STOP-$$"
    mv "$run/.STOP-$$" "$run/STOP"
}

# The exit code of the run: as hpclr recorded it, since launchers change it; else the launcher's.
outcome() {
    local place=$HPCLR_LAUNCH recorded=
    [ ! -e "$place/attempt" ] || place=$(cat "$place/attempt")
    [ ! -e "$place/exit.json" ] || recorded=$(sed -n 's/^ *"code": *\([0-9][0-9]*\),*$/\1/p' "$place/exit.json")
    rm -rf "$HPCLR_LAUNCH"
    if [ -n "$recorded" ]; then echo "$recorded"; elif [ "$1" -gt 128 ]; then echo 75; else echo "$1"; fi
}

# 0: done. 85: saved. 75: worth another try. Anything else: failed.
finish() {
    case $1 in
    0) exit 0 ;;
    85 | 75) ;;
    *) exit "$1" ;;
    esac
    if [ "$1" = 85 ] && grep -q '^end' "$run/STOP" 2>/dev/null; then
        echo "$run is saved and ends as it was asked to; sbatch continues it"
        exit 0
    fi
    local before step restart=${SLURM_RESTART_COUNT:-0}
    step=$(newest_step)
    before=$(sed -n "s/^$SLURM_JOB_ID [0-9]* //p" "$run/logs/progress" 2>/dev/null | tail -n 1) || true
    echo "$SLURM_JOB_ID $restart $step" >>"$run/logs/progress"
    if [ "$step" -le "${before:--1}" ]; then
        echo "two attempts in a row have saved nothing beyond step $step; not requeued. See $run/logs/attempt-*" >&2
        exit 1
    fi
    if [ $((restart + 1)) -ge "${HPCLR_ATTEMPTS:-20}" ]; then
        echo "$((restart + 1)) attempts are enough (HPCLR_ATTEMPTS); not requeued. sbatch continues $run" >&2
        exit 1
    fi
    requeue
}

# The step of the newest checkpoint that was written to its end.
newest_step() {
    local newest=0 digest step
    for digest in "$run"/checkpoints/step-*.h5.sha256; do
        step=$(basename "$digest" .h5.sha256)
        [ ! -e "${digest%.sha256}" ] || [ $((10#${step#step-})) -le "$newest" ] || newest=$((10#${step#step-}))
    done
    echo "$newest"
}

# Slurm's controller may be away for a while.
requeue() {
    local pause
    for pause in ${HPCLR_PAUSES:-0 5 10 15 30 60}; do
        sleep "$pause"
        ! scontrol requeue "$SLURM_JOB_ID" || exit 0
    done
    echo "Slurm did not take the request; to continue: scontrol requeue $SLURM_JOB_ID, or sbatch" >&2
    exit 1
}
