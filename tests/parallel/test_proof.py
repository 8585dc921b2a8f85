"""Who belongs to the run, and whether all work on the same things."""

import os
import time

import pytest
from forked import layout, run_all

from hpclr.errors import UsageError
from hpclr.parallel.meeting import consultation, proof
from hpclr.parallel.meeting.proof import agree, share_secret
from hpclr.parallel.meeting.rendezvous import meet

ROUND = "attempt 3, start"


def together(rank, size, directory, work):
    mine = layout(rank, size)
    store = meet(mine, directory=directory, timeout=15)
    try:
        return work(store, mine)
    finally:
        if rank == 0:
            time.sleep(0.5)  # the store lives here


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_get_the_same_secret_and_hear_all(tmp_path, size):
    def work(store, mine):
        secret = share_secret(store, mine, tmp_path, 10)
        own = {"cores": str(mine.rank)}
        return secret, agree(store, mine, secret, ROUND, {"data digest": "9f8e"}, 10, own=own)

    said = run_all(size, lambda rank: together(rank, size, tmp_path, work))
    assert len({secret for secret, _ in said.values()}) == 1
    assert len(said[0][0]) == 32
    for _, statements in said.values():
        assert [statement.rank for statement in statements] == list(range(size))
        assert [statement.own["cores"] for statement in statements] == [str(rank) for rank in range(size)]
    assert list(tmp_path.iterdir()) == []


def test_each_attempt_has_its_own_secret(tmp_path):
    secrets = {share_secret(meet(layout(0, 1), directory=tmp_path, timeout=1), layout(0, 1), tmp_path, 5) for _ in "ab"}
    assert len(secrets) == 2


@pytest.mark.parametrize("odd", [0, 2])
def test_who_differs_is_named_on_all(tmp_path, odd):
    def work(store, mine):
        value = "1a2b" * 16 if mine.rank == odd else "9f8e" * 16
        return agree(store, mine, b"s" * 32, ROUND, {"run file": "same", "data digest": value}, 10)

    said = run_all(4, lambda rank: together(rank, 4, tmp_path, work))
    assert len(set(said.values())) == 1
    kind, text = said[0]
    host = os.uname().nodename
    others = "ranks 1-3" if odd == 0 else "ranks 0-1, 3"
    assert kind == "UsageError"
    assert f"data digest: rank {odd} ({host}) has 1a2b1a2b1a2b…, {others} ({host}) have 9f8e9f8e9f8e…" in text
    assert "run file:" not in text


def test_a_fact_that_one_does_not_know_differs(tmp_path):
    def work(store, mine):
        return agree(store, mine, b"s" * 32, ROUND, {"code": "1"} if mine.rank else {}, 10)

    said = run_all(2, lambda rank: together(rank, 2, tmp_path, work))
    assert "has none" in said[0][1]


def test_values_that_begin_alike_are_told_apart(tmp_path):
    def work(store, mine):
        return agree(store, mine, b"s" * 32, ROUND, {"file": "/scratch/data/v" + str(mine.rank)}, 10)

    text = run_all(2, lambda rank: together(rank, 2, tmp_path, work))[1][1]
    assert "/scratch/data/v0" in text
    assert "/scratch/data/v1" in text


@pytest.mark.parametrize("change", ["secret", "round"])
def test_a_stranger_is_found_out_by_all(tmp_path, change, monkeypatch):
    real = proof._sign

    def work(store, mine):
        if mine.rank == 1 and change == "round":  # replays what it signed in another round
            monkeypatch.setattr(proof, "_sign", lambda s, r, *rest: real(s, "attempt 2, start", *rest))
        secret = b"x" * 32 if mine.rank == 1 and change == "secret" else b"s" * 32
        return agree(store, mine, secret, ROUND, {"code": "1"}, 10)

    said = run_all(3, lambda rank: together(rank, 3, tmp_path, work))
    assert len(set(said.values())) == 1
    assert said[0][0] == "UsageError"
    assert said[0][1].startswith("rank 1 (")
    assert "cannot prove to belong to this run" in said[0][1]


def test_who_does_not_come_is_named_on_all(tmp_path):
    def work(store, mine):
        return None if mine.rank in (1, 2) else agree(store, mine, b"s" * 32, ROUND, {}, 1)

    said = run_all(4, lambda rank: together(rank, 4, tmp_path, work))
    assert said[0] == said[3]
    assert said[0][0] == "RetryableError"
    assert f"ranks 1-2 of 4 did not come to the {ROUND}" in said[0][1]


def test_rank_0_stays_until_a_slow_process_knows_why(tmp_path, monkeypatch):
    def work(store, mine):
        real = consultation._await_verdict
        monkeypatch.setattr(consultation, "_await_verdict", lambda *question: (time.sleep(1.5), real(*question))[1])
        return agree(store, mine, b"s" * 32, ROUND, {"code": str(mine.rank)}, 10)

    said = run_all(2, lambda rank: together(rank, 2, tmp_path, work))
    assert said[0] == said[1]
    assert said[0][0] == "UsageError"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_secret_that_others_may_read_is_refused(tmp_path, mode):
    path = tmp_path / ".nonce-0123456789abcdef"
    path.write_bytes(b"n" * 32)
    path.chmod(mode)
    with pytest.raises(UsageError, match=f"mode {mode:04o}"):
        proof._read_secret(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_secret_of_another_owner_is_refused(tmp_path):
    path = tmp_path / ".nonce-0123456789abcdef"
    path.write_bytes(b"n" * 32)
    path.chmod(0o600)
    os.chown(path, 65534, 65534)
    with pytest.raises(UsageError, match="belongs to user 65534"):
        proof._read_secret(path)


def test_a_link_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"n" * 32)
    link = tmp_path / ".nonce-0123456789abcdef"
    link.symlink_to(tmp_path / "file")
    with pytest.raises(UsageError, match="cannot read"):
        proof._read_secret(link)


def test_a_directory_that_is_not_shared_stops_all(tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "_VISIBLE", 0.3)
    (tmp_path / "elsewhere").mkdir()

    def work(store, mine):
        return share_secret(store, mine, tmp_path / "elsewhere" if mine.rank == 1 else tmp_path, 10)

    said = run_all(2, lambda rank: together(rank, 2, tmp_path, work))
    assert said[0] == said[1]
    assert said[0][0] == "UsageError"
    assert "does not see" in said[0][1]
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_a_directory_that_cannot_be_written_stops_all(tmp_path):
    def work(store, mine):
        return share_secret(store, mine, tmp_path / "gone", 10)

    said = run_all(2, lambda rank: together(rank, 2, tmp_path, work))
    assert {kind for kind, _ in said.values()} == {"RetryableError"}
    assert "cannot write" in said[1][1]
