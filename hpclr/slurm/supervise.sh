# What all batch scripts of hpclr do around the processes of a run. `hpclr submit` writes these lines into its scripts,
# and those of jobs/ read them from this file.
#
#   supervise RUN LAUNCHER [WORD …]
#
# starts the launcher in the background, so that bash hears Slurm's warnings; lets the run in the directory RUN, which
# is absolute, save before the job ends; and requeues the job until the run is done, fails, or gets no further. It does
# not return. Three variables may be set before:
#
#   HPCLR_ATTEMPTS=20     starts that the job may have
#   HPCLR_CHAIN=no        yes: the job is not requeued but ends with 85, and the next of a chain of jobs goes on
#   HPCLR_PATIENCE=120    seconds for which a requeue is tried

# A signal that comes before the launcher runs would end the script. It is remembered, from here on.
for signal in USR1 USR2 TERM; do trap "HPCLR_EARLY=$signal" "$signal"; done

supervise() {
  local signal code
  RUN=$1 HPCLR_ATTEMPTS=${HPCLR_ATTEMPTS:-20} HPCLR_CHAIN=${HPCLR_CHAIN:-no} HPCLR_PATIENCE=${HPCLR_PATIENCE:-120}
  HPCLR_ASKED=
  shift
  trap 'rm -rf "${HPCLR_LAUNCH:-}"' EXIT
  begin
  HPCLR_DEADLINE=$(deadline)
  export HPCLR_LAUNCH HPCLR_DEADLINE
  [ -n "$HPCLR_DEADLINE" ] || unset HPCLR_DEADLINE
  for signal in USR1 USR2 TERM; do trap "stop $signal" "$signal"; done
  if [ -n "${HPCLR_EARLY:-}" ]; then
    trap '' USR1 USR2 TERM
    say "signal $HPCLR_EARLY: the processes are not started"
    go_on 85
  fi
  echo "$SLURM_JOB_ID ${SLURM_RESTART_COUNT:-0} $(newest_step)" >>"$RUN/logs/progress"
  noted "$@" &
  # A signal to this script ends `wait`, not the launcher; what `wait` then returns is no exit code one can rely on.
  until [ -s "$HPCLR_LAUNCH/code" ] || ! kill -0 $! 2>/dev/null; do wait $! || true; done
  trap '' USR1 USR2 TERM
  code=$(cat "$HPCLR_LAUNCH/code" 2>/dev/null || echo 75)
  code=$(outcome "$code")
  case $code in
    0) over 0 ;;
    75 | 85) go_on "$code" ;;
    *) over "$code" ;;
  esac
}

# Runs the launcher, and writes down its exit code. A signal to all processes of the job is the launcher's alone.
noted() {
  trap : USR1 USR2 TERM
  set +e
  (set -e; "$@")
  echo $? >"$HPCLR_LAUNCH/code"
}

say() { printf 'hpclr: %s\n' "$*" >&2; }

# Prepares a start, unless there is to be none. Slurm itself starts a job again that was preempted or has lost a node.
# logs/progress has a line for each launch since the job, or its chain, first started: job, restart, step it began with.
begin() {
  local restart=${SLURM_RESTART_COUNT:-0} follows=no last why
  mkdir -p "$RUN/logs"
  cp "$0" "$RUN/logs/${SLURM_JOB_ID}_submission.sh" 2>/dev/null || true # slurm-tools look for it
  rm -rf "$RUN/logs/.launch-$SLURM_JOB_ID-"* # of a start that was killed
  [[ $HPCLR_CHAIN == no || ${SLURM_JOB_DEPENDENCY:-} != *afternotok:* ]] || follows=yes
  if [[ $restart == 0 && $follows == no ]]; then : >"$RUN/logs/progress"; fi
  touch "$RUN/logs/progress"
  last=$(tail -n 1 "$RUN/logs/progress")
  if [[ $follows == yes && $last == over\ * ]]; then
    say "an earlier job of this chain has ended it with exit code ${last#over }: nothing is left to do"
    exit "${last#over }"
  fi
  if [[ ($restart != 0 || $follows == yes) && $(request) == end ]]; then
    record 85 saved "the job was lost, and not started again as it was asked to; saved at step $(newest_step)"
    obeyed 'not started again'
  elif why=$(enough "$restart"); then
    record 75 retry "the job was lost, and not started again: $why"
    say "not started again: $why; saved at step $(newest_step). $RUN/logs may tell more. $(again)"
    over 1
  fi
  # Where the processes say which attempt this is, or that they have failed before there was one.
  HPCLR_LAUNCH=$(mktemp -d "$RUN/logs/.launch-$SLURM_JOB_ID-XXXXXX")
  [ ! -e "$RUN/STOP" ] || ln "$RUN/STOP" "$HPCLR_LAUNCH/STOP" || true # by which an old request is known
}

# Asks the run to save and to end, unless it has been asked already; it looks for the file. One signal is enough: each
# further one is passed over in a word, since they may come faster than a file is written.
stop() {
  [ -z "${HPCLR_ASKED:-}" ] || return 0
  HPCLR_ASKED=$1
  local new=$RUN/.tmp-STOP-$SLURM_JOB_ID
  say "signal $1: the run is asked to save"
  ! is_old || rm -f "$RUN/STOP"
  printf 'requeue signal %s from Slurm\n' "$1" >"$new" && mv -n "$new" "$RUN/STOP" || HPCLR_ASKED= # the next may succeed
  rm -f "$new"
}

# How the run was asked to end since this start: requeue, end, or nothing.
request() { is_old || sed -n '1{s/ .*//;p;q}' "$RUN/STOP" 2>/dev/null || true; }

# A request from before this start is none to it. The run removes it once it has the directory for itself.
is_old() { [ "$RUN/STOP" -ef "${HPCLR_LAUNCH:-}/STOP" ]; }

# When Slurm will end the job, in seconds since 1970; nothing if it does not say. Older ones have no such variable.
deadline() {
  local end
  if [[ ${SLURM_JOB_END_TIME:-} =~ ^[0-9]+$ ]]; then
    echo "$SLURM_JOB_END_TIME"
  else
    end=$(ask %e) && [[ $end == 2* ]] && date --date="$end" +%s || true
  fi
}

# What squeue says of this job in one of its formats; an array's number may bring other jobs with it.
ask() {
  SLURM_TIME_FORMAT=standard timeout 30 squeue --noheader --jobs="$SLURM_JOB_ID" --format="%A $1" 2>/dev/null |
    sed -n "s/^$SLURM_JOB_ID //p"
}

# A job that has been cancelled is still there while it ends, and Slurm would requeue it if asked to; one that somebody
# has requeued looks the same, and needs nobody to ask.
cancelled() {
  local state
  state=$(ask '%T %r') || return 1
  [[ $state == CANCELLED* || ($state == COMPLETING* && $state != *TimeLimit*) ]]
}

# The step of the newest checkpoint that was completed; 0 if there is none.
newest_step() {
  local file step newest=0
  for file in "$RUN"/checkpoints/step-*.h5.sha256; do
    step=${file##*/step-} step=${step%.h5.sha256}
    if [[ $step =~ ^[0-9]{8,18}$ && -e ${file%.sha256} ]] && ((10#$step > newest)); then newest=$((10#$step)); fi
  done
  echo "$newest"
}

# How the attempt ended, as its processes have recorded it: launchers change exit codes. Else what the launcher said, but
# that all went well. Processes may outlive a launcher, which for some failures says that.
outcome() {
  local place=$HPCLR_LAUNCH code=$1 patience=20
  if [ -s "$place/attempt" ]; then
    place=$RUN/logs/$(sed 's/.*\///' "$place/attempt")
    until [ -s "$place/exit.json" ] || ((patience-- == 0)); do sleep 1; done
    if [ "$code" = 0 ]; then code=75; fi
  fi
  if ((code > 128)); then code=75; fi # killed
  sed -n 's/^  "code": \([0-9]\{1,3\}\),\{0,1\}$/\1/p' "$place/exit.json" 2>/dev/null | grep . || echo "$code"
}

# Has the run had all its starts, or gained nothing in the last two? Says which.
enough() { # STARTS
  local steps step
  step=$(newest_step)
  mapfile -t steps < <(sed -n 's/^[0-9]* [0-9]* \([0-9]*\)$/\1/p' "$RUN/logs/progress" | tail -n 2)
  if (($1 >= HPCLR_ATTEMPTS)); then
    echo "the last of $HPCLR_ATTEMPTS starts has ended"
  elif ((${#steps[@]} == 2 && step <= steps[1] && steps[1] <= steps[0])); then
    echo "two starts in a row have not come beyond step $step"
  else
    return 1
  fi
}

# Says how the newest attempt ended, if its processes could not.
record() { # CODE OUTCOME MESSAGE
  local place new=$RUN/.tmp-exit-$SLURM_JOB_ID
  place=$(printf '%s\n' "$RUN"/logs/attempt-* | sort -V | tail -n 1)
  [ -d "$place" ] || return 0
  printf '{\n  "code": %d,\n  "outcome": "%s",\n  "message": "%s",\n  "time": "%s"\n}\n' \
    "$@" "$(date --iso-8601=seconds)" >"$new" && mv -n "$new" "$place/exit.json" || true
  rm -f "$new"
}

# A port of this node, the first of the job, on which nobody listens; those from 32768 on are given away by Linux.
free_port() {
  local port=$((20000 + SLURM_JOB_ID % 10000))
  while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
  echo "$port"
}

# Ends the job for good; the jobs of a chain that come after it will know.
over() {
  if [ "$HPCLR_CHAIN" = yes ]; then echo "over $1" >>"$RUN/logs/progress"; fi
  exit "$1"
}

# Ends a job that was asked to end.
obeyed() {
  rm -f "$RUN/STOP"
  say "saved at step $(newest_step), and $1 as it was asked to. $(again)"
  over 0
}

# What a person does to have the run go on.
again() {
  if [ -e "$RUN/submission/job.sh" ]; then
    printf 'To go on: hpclr resume %q' "$RUN"
  else
    printf 'To go on: submit the same script again'
  fi
}

# The run can go on. Should it, by itself?
go_on() {
  local code=$1 step why next
  step=$(newest_step)
  if [[ $(request) == end && $code == 85 ]]; then
    obeyed ended
  elif [ "$(request)" = end ]; then
    say "asked to end, but failed (exit code $code) before it could save; it was saved at step $step. $(again)"
    over "$code"
  elif cancelled; then
    next=$(again)
    if [ "$HPCLR_CHAIN" = yes ]; then
      next=$(printf 'the next job of the chain goes on, if there is one; hpclr cancel %q ends the chain. %s' "$RUN" "$next")
    fi
    say "Slurm ends the job, which somebody has cancelled or requeued; saved at step $step. If cancelled: $next"
    exit "$code"
  elif why=$(enough $((${SLURM_RESTART_COUNT:-0} + 1))); then
    say "$why (exit code $code); saved at step $step. $RUN/logs may tell more. $(again)"
    over 1
  elif [ "$HPCLR_CHAIN" = yes ]; then
    say "exit code $code at step $step: the next job of the chain goes on. If this was the last one: $(again)"
    exit 85
  fi
  say "exit code $code at step $step: requeueing job $(self)"
  requeue && exit 85
  say "Slurm did not requeue the job in $HPCLR_PATIENCE seconds. To go on: scontrol requeue $(self). $(again)"
  exit 1
}

# This job and no other: the number of an array's last element is also that of the whole array.
self() { echo "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"; }

# Slurm's controller may be away for a while.
requeue() {
  local end=$((SECONDS + HPCLR_PATIENCE))
  until timeout 60 scontrol requeue "$(self)"; do
    ((SECONDS < end)) || return 1
    sleep 5
  done
}
