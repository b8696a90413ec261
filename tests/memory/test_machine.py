"""A bank and a plain dictionary go through the same random life; they must never tell different stories."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tinyalign.memory import BankError, BankLockedError, MemoryBank, StaleBankError, UnknownIdError

WIDTH, SHAPE = 3, (2,)
numbers = st.integers(-9, 9)
ids = st.integers(0, 25)
entry = st.tuples(ids, st.tuples(numbers, numbers, numbers), st.tuples(numbers, numbers), st.integers(-1, 4), numbers)


def kept(entries):
    return {i: (key, value, group, {"n": note} if note else {}) for i, key, value, group, note in entries}


class BankMachine(RuleBasedStateMachine):
    """``model`` is what the bank holds, ``saved`` what the disk must; both map id -> (key, value, group, note)."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "bank"
        self.bank = MemoryBank(WIDTH, SHAPE, metric="ip")
        self.model, self.saved = {}, None
        self.highest = self.saved_highest = -1  # no id up to here is given out again

    def now_saved(self):
        self.saved, self.saved_highest = dict(self.model), self.highest

    def teardown(self):
        shutil.rmtree(self.folder)

    @rule(
        entries=st.lists(entry, min_size=1, max_size=6, unique_by=lambda each: each[0]),
        again=st.sampled_from([0, 0, 1]),
    )
    def add(self, entries, again):
        new = kept(each for each in entries if again or each[0] not in self.model)
        if not new:
            return
        arguments = (
            torch.tensor([each[0] for each in new.values()], dtype=torch.float32),
            torch.tensor([each[1] for each in new.values()], dtype=torch.float32),
            list(new),
            [each[2] for each in new.values()],
            [each[3] or None for each in new.values()],
        )
        if new.keys() & self.model.keys():
            with pytest.raises(ValueError, match="ids must be new"):
                self.bank.add(*arguments)
            return
        assert self.bank.add(*arguments).tolist() == list(new)
        self.model.update(new)
        self.highest = max(self.highest, *new)

    @rule(key=st.tuples(numbers, numbers, numbers))
    def add_without_an_id(self, key):
        (made,) = self.bank.add(torch.tensor([key]).float(), torch.zeros(1, *SHAPE)).tolist()
        assert made > self.highest
        self.highest = made
        self.model[made] = (key, (0, 0), -1, {})

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data):
        gone = data.draw(st.lists(st.sampled_from(sorted(self.model)), min_size=1, max_size=4))
        assert self.bank.remove(gone) == len(set(gone))
        for each in set(gone):
            del self.model[each]

    @rule(gone=st.lists(ids, min_size=1, max_size=4))
    def remove_what_is_not_there(self, gone):
        if set(gone) - self.model.keys():
            with pytest.raises(UnknownIdError):
                self.bank.remove(gone)

    @precondition(lambda self: self.model)
    @rule(
        query=st.tuples(numbers, numbers, numbers),
        k=st.integers(0, 30),
        hidden=st.sets(ids, max_size=4),
        group=st.integers(-1, 4),
    )
    def search(self, query, k, hidden, group):
        queries = torch.tensor([query, query]).float()  # the second query hides nothing
        found = self.bank.search(queries, k, exclude_ids=[hidden, set()], exclude_groups=[[group], []])
        for row, (left_out, left_group) in enumerate(((hidden, group), (set(), -1))):
            allowed = {
                i: sum(a * b for a, b in zip(query, each[0], strict=True))
                for i, each in self.model.items()
                if i not in left_out and (each[2] != left_group or left_group < 0)
            }
            hits = found.ids[row][found.mask[row]].tolist()
            assert found.scores[row][found.mask[row]].tolist() == sorted(allowed.values(), reverse=True)[:k]
            assert [allowed[hit] for hit in hits] == sorted(allowed.values(), reverse=True)[:k]
            assert [tuple(value) for value in found.values[row][found.mask[row]].tolist()] == [
                self.model[hit][1] for hit in hits
            ]

    @rule()
    def save(self):
        self.bank.save(self.path)
        self.now_saved()

    @precondition(lambda self: self.saved is not None and self.bank.path is not None)
    @rule()
    def commit(self):
        self.bank.commit()
        self.now_saved()

    @rule()
    def compact(self):
        self.bank.compact()
        if self.bank.path is not None:
            self.now_saved()

    @precondition(lambda self: self.saved is not None)
    @rule(mmap=st.booleans())
    def load(self, mmap):
        """What was not committed is lost."""
        self.bank = MemoryBank.load(self.path, mmap=mmap)
        self.model, self.highest = dict(self.saved), self.saved_highest

    @precondition(lambda self: self.saved is not None and self.bank.path is not None)
    @rule(moment=st.integers(0, 12), write=st.sampled_from(["commit", "compact", "save"]))
    def kill(self, moment, write):
        """A child writes what the bank holds and dies at one of its syncs; old or new must be there, and whole."""
        child = os.fork()
        if not child:
            signal.alarm(120)
            left, sync = [moment], os.fsync

            def fatal(handle):
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                sync(handle)

            os.fsync = fatal
            try:
                twin = MemoryBank.merge([self.bank]) if write == "save" else self.bank
                twin.save(self.path) if write == "save" else getattr(twin, write)()
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        self.bank = MemoryBank.load(self.path)
        self.bank.verify()
        assert content(self.bank) in ([self.model] if status == 0 else [self.saved, self.model])
        self.model = content(self.bank)
        self.highest = self.saved_highest if status else self.highest
        self.now_saved()

    @precondition(lambda self: self.saved is not None and self.bank.path is not None)
    @rule()
    def overtaken(self):
        """Somebody else commits first: this object's changes are refused, and it has to be loaded again."""
        other = MemoryBank.load(self.path)
        (made,) = other.add(torch.ones(1, WIDTH), torch.ones(1, *SHAPE)).tolist()
        assert made > self.saved_highest
        other.commit()
        self.saved = {**self.saved, made: ((1,) * WIDTH, (1,) * SHAPE[0], -1, {})}
        if content(self.bank) != content(other):
            self.bank.add(torch.ones(1, WIDTH), torch.ones(1, *SHAPE))
            with pytest.raises((StaleBankError, BankLockedError)):
                self.bank.commit()
        self.bank = other
        self.model, self.highest = dict(self.saved), made
        self.now_saved()

    @invariant()
    def tells_the_same(self):
        assert len(self.bank) == len(self.model)
        assert content(self.bank) == self.model
        for each in (0, 13, 25):
            assert (each in self.bank) == (each in self.model)
        if not self.model:
            with pytest.raises(BankError, match="the bank must hold entries, got 0"):
                self.bank.search(torch.ones(1, WIDTH))


def content(bank):
    found = bank.ids
    values, _ = bank.gather(found)
    columns = zip(bank.keys().tolist(), values.tolist(), bank.groups.tolist(), bank.metadata(found), strict=True)
    return {
        i: (tuple(key), tuple(value), group, note)
        for i, (key, value, group, note) in zip(found.tolist(), columns, strict=True)
    }


BankMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, suppress_health_check=list(HealthCheck)
)
TestBank = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")(BankMachine.TestCase)
