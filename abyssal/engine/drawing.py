"""One step's draws: for each row the next id, what is told about it, and whether the row ends there.

In this order: penalties and biases (`penalties.py`), masks, the draw (`sampler.py`), forced ids (`control.py`); then
controls and stop strings hear of it. A row that fails is found among the others and fails alone. Writes ids into `Rows`
and notes into sequences; owns what stays the same from step to step while the same rows run.
Letters: B rows of a step, C rows with a control, P with penalties, A whose likeliest ids are told, V vocabulary,
X tokens of all rows.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from abyssal.engine.control import Control, Steering, steer
from abyssal.engine.draft import Drafts
from abyssal.engine.isolation import isolate, said
from abyssal.engine.penalties import Bias
from abyssal.engine.sampler import Drawn, Sampling, draw, kept_ids, sample, sampled_logps, sampling
from abyssal.engine.sequence import Rows, Sequence
from abyssal.engine.verify import Verified, verify
from abyssal.types import FinishReason

T = TypeVar("T")


class Ending(NamedTuple):
    """Why a sequence ends. `stop` is the string that a "stop" was for, if it was no end token."""

    reason: FinishReason
    error: str | None = None
    stop: str | None = None


class Step(NamedTuple):
    """What became of the rows: those that ended, and those that drew nothing because their logits are not finite."""

    ended: list[tuple[Sequence, Ending]]
    not_finite: list[Sequence]


class Plan(NamedTuple):
    """How these rows draw, by their places in the batch. None and []: no row asks."""

    how: Sampling
    penalised_P: np.ndarray | None
    bias: Bias | None
    told: list[int]
    watched: list[int]  # for stop strings


class Part(NamedTuple):
    """Drawn, and not yet written down."""

    rows_B: np.ndarray
    plan: Plan
    drawn: Drawn
    ids_B: np.ndarray
    logps_B: np.ndarray


class Drawing:
    def __init__(self, rows: Rows, *, vocab_size: int, is_eos_V: np.ndarray, record_sampling: bool) -> None:
        self._rows, self._vocab_size, self._is_eos_V = rows, vocab_size, is_eos_V
        self._record_sampling = record_sampling
        self._kept: tuple[int, Plan] | None = None

    def draw(self, rows_B: np.ndarray, logits_BV: Tensor, *, version: int) -> Step:
        """Append one id to each of these rows. `version` is another one whenever other rows run."""

        def work(places: np.ndarray) -> tuple[list[Part], Step]:
            return self._draw(*_some(rows_B, logits_BV, places), version)

        step = Step([], [])
        done, errors = isolate(len(rows_B), work)
        for place, error in errors.items():
            step.ended.append((self._rows.sequence_in(int(rows_B[place])), Ending("error", error)))
        for parts, others in done:
            for part in parts:
                step.ended.extend(self._append(part))
            step.ended.extend(others.ended)
            step.not_finite.extend(others.not_finite)
        return step

    def draw_runs(self, rows_B: np.ndarray, drafts: Drafts, logits_XV: Tensor, *, version: int) -> Step:
        """Append to each row what it draws for as long as its drafts are that, and one id more; logits_XV are of the
        1 + drafts.counts_B[b] tokens of row b, row after row."""
        if not drafts.most:
            return self.draw(rows_B, logits_XV, version=version)
        rows, first_B = self._rows, (1 + drafts.counts_B).cumsum() - (1 + drafts.counts_B)
        run = None
        with contextlib.suppress(Exception):  # whoever's fault it is, token by token it is that one's alone
            run = verify(
                logits_XV[:, : self._vocab_size],
                drafts,
                start_B=rows.length_R[rows_B],
                freely_B=rows.draws_freely_R[rows_B] & ~rows.controlled_R[rows_B],
                how=self._plan(rows_B, version, logits_XV.device).how,
                is_end_V=self._is_eos_V,
            )
        step, going_B, column = Step([], []), np.arange(len(rows_B)), 0
        if run is not None:
            step.ended.extend(self._append_runs(rows_B, run))
            going_B = np.flatnonzero(run.counts_B == 0)
        while len(going_B):
            some = self.draw(rows_B[going_B], logits_XV[torch.from_numpy(first_B[going_B] + column)], version=version)
            step.ended.extend(some.ended)
            step.not_finite.extend(some.not_finite)
            over = {sequence.row for sequence, _ in some.ended} | {sequence.row for sequence in some.not_finite}
            goes_on = [row not in over for row in rows_B[going_B].tolist()] & (drafts.counts_B[going_B] > column)
            going_B = going_B[goes_on]
            drawn_B = rows.ids_RT[rows_B[going_B], rows.length_R[rows_B[going_B]] - 1]
            going_B, column = going_B[drawn_B == drafts.ids_BK[going_B, min(column, drafts.most - 1)]], column + 1
        return step

    def guess(self, rows_B: np.ndarray, positions_B: np.ndarray, logits_BV: Tensor, version: int) -> np.ndarray:
        """What these rows would draw from such logits there, were there no controls and penalties."""
        positions = torch.from_numpy(positions_B).to(logits_BV.device)
        how = self._plan(rows_B, version, logits_BV.device).how
        return draw(logits_BV[:, : self._vocab_size], positions, how)[0].cpu().numpy()

    def _append_runs(self, rows_B: np.ndarray, run: Verified) -> list[tuple[Sequence, Ending]]:
        rows, drawn = self._rows, run.drawn
        if self._record_sampling and drawn.probs_BV is not None and (run.how.any_scaled or run.how.any_filter):
            self._note_sampling(rows_B[run.place_X], run.column_X, run.how, drawn, drawn.probs_BV)
        is_done_B = rows.append_runs(rows_B, run.counts_B, drawn.ids_B.cpu().numpy(), drawn.logps_B.cpu().numpy())
        last_B = rows.ids_RT[rows_B, rows.length_R[rows_B] - 1]
        is_eos_B = self._is_eos_V[last_B] & (run.counts_B > 0)
        return [
            (self._sequence(rows_B, place), Ending("stop" if is_eos_B[place] else "length"))
            for place in np.flatnonzero(is_done_B | is_eos_B).tolist()
        ]

    def _draw(self, rows_B: np.ndarray, logits_BV: Tensor, version: int) -> tuple[list[Part], Step]:
        """A draw for all rows but those in the step that comes with it."""
        plan = self._plan(rows_B, version, logits_BV.device)
        controlled = self._controlled(rows_B)
        steering, errors = self._steer(rows_B, controlled) if controlled else (None, {})
        drawn = self._drawn(rows_B, logits_BV, plan, steering)
        ids_B, logps_B = drawn.ids_B.cpu().numpy(), drawn.logps_B.cpu().numpy()
        is_good_B = np.isfinite(logps_B)
        if is_good_B.all() and not errors:
            return [Part(rows_B, plan, drawn, ids_B, logps_B)], Step([], [])
        lost = [i for i in (~is_good_B).nonzero()[0].tolist() if i not in errors]
        is_good_B[list(errors)] = False
        rest = is_good_B.nonzero()[0]
        parts, others = self._draw(*_some(rows_B, logits_BV, rest), version) if len(rest) else ([], Step([], []))
        return parts, Step(
            others.ended + [(self._sequence(rows_B, i), Ending("error", error)) for i, error in errors.items()],
            others.not_finite + [self._sequence(rows_B, i) for i in lost],
        )

    def _drawn(self, rows_B: np.ndarray, logits_BV: Tensor, plan: Plan, steering: Steering | None) -> Drawn:
        rows, device = self._rows, logits_BV.device
        length_B = rows.length_R[rows_B]
        shaped_BV = None
        if plan.penalised_P is not None or plan.bias is not None:
            shaped_BV = logits_BV.clone()
            if plan.penalised_P is not None:
                at_P = torch.from_numpy(plan.penalised_P).to(device)
                rows_P, length_P = rows_B[plan.penalised_P], length_B[plan.penalised_P]
                shaped_BV[at_P] = rows.penalties.apply(logits_BV[at_P], rows_P, rows.ids_RT, length_P)
            if plan.bias is not None:
                shaped_BV.index_put_((plan.bias.rows_X, plan.bias.ids_X), plan.bias.values_X, accumulate=True)
            shaped_BV = shaped_BV[:, : self._vocab_size]
        return sample(
            logits_BV[:, : self._vocab_size],
            torch.from_numpy(length_B).to(device),
            plan.how,
            steering=steering,
            shaped_BV=shaped_BV,
        )

    def _append(self, part: Part) -> list[tuple[Sequence, Ending]]:
        """Write the drawn ids down; returns who ends with them. Done twice it is as done once."""
        rows, rows_B, plan = self._rows, part.rows_B, part.plan
        positions_B = rows.length_R[rows_B]
        rows.ids_RT[rows_B, positions_B] = part.ids_B
        rows.logps_RT[rows_B, positions_B] = part.logps_B
        if plan.told:
            self._note_likeliest(part)
        if self._record_sampling and part.drawn.probs_BV is not None and (plan.how.any_scaled or plan.how.any_filter):
            nothing_B = np.zeros(len(rows_B), np.int64)
            self._note_sampling(rows_B, nothing_B, plan.how, part.drawn, part.drawn.probs_BV)
        if plan.penalised_P is not None:
            rows.penalties.drew(rows_B[plan.penalised_P], rows.ids_RT, positions_B[plan.penalised_P])
        rows.length_R[rows_B] = positions_B + 1
        endings: dict[int, Ending] = {}
        is_eos_B = self._is_eos_V[part.ids_B]
        is_done_B = is_eos_B | (positions_B + 1 >= rows.limit_R[rows_B])
        for place in is_done_B.nonzero()[0].tolist():
            endings[place] = Ending("stop" if is_eos_B[place] else "length")
        for place in plan.watched:
            sequence = self._sequence(rows_B, place)
            if sequence.search is not None and (stop := sequence.search.through(rows.drawn(sequence))):
                endings[place] = Ending("stop", stop=stop)
        endings |= {
            place: Ending("error", error) for place, error in self._tell(rows_B, self._controlled(rows_B)).items()
        }
        return [(self._sequence(rows_B, place), ending) for place, ending in endings.items()]

    def overdue(self, sequence: Sequence) -> Ending | None:
        """For a sequence out of its row: how it should have ended, had its last step not been cut short."""
        if not len(sequence.ids):
            return None
        if self._is_eos_V[sequence.ids[-1]]:
            return Ending("stop")
        if sequence.search is not None and (stop := sequence.search.through(sequence.ids)):
            return Ending("stop", stop=stop)
        return Ending("length") if len(sequence.prompt_ids) + len(sequence.ids) >= sequence.limit else None

    def _steer(self, rows_B: np.ndarray, controlled: list[int]) -> tuple[Steering, dict[int, str]]:
        errors = self._tell(rows_B, controlled)  # a step that was cut short may have drawn without telling
        controls: list[tuple[int, Control]] = []
        for place in controlled:
            control = self._sequence(rows_B, place).control
            if control is not None and place not in errors:
                controls.append((place, control))
        steering = steer(controls, n_vocab=self._vocab_size)
        return steering, errors | steering.errors

    def _tell(self, rows_B: np.ndarray, controlled: list[int]) -> dict[int, str]:
        """Tell the controls at these places what their rows have drawn; returns what went wrong, by place."""
        errors: dict[int, str] = {}
        for place in controlled:
            sequence = self._sequence(rows_B, place)
            try:
                self.catch_up(sequence)
                if sequence.thinking is not None and sequence.control is sequence.thinking:
                    # the answer is not its business: from there on the row costs what an ordinary one does
                    self._rows.controlled_R[rows_B[place]] = not sequence.thinking.is_closed
            except Exception as error:  # whatever it is, it is this request's alone
                errors[place] = said(error)
        return errors

    def catch_up(self, sequence: Sequence) -> None:
        """Tell a control what it has not heard yet."""
        for token in self._rows.drawn(sequence, since=sequence.n_told).tolist():
            sequence.n_told += 1
            if sequence.control is not None:
                sequence.control.drawn(token)

    def _controlled(self, rows_B: np.ndarray) -> list[int]:
        places: list[int] = self._rows.controlled_R[rows_B].nonzero()[0].tolist()
        return places

    def _note_likeliest(self, part: Part) -> None:
        """Write down the likeliest ids, where asked for."""
        sequences = [self._sequence(part.rows_B, place) for place in part.plan.told]
        logps_AV = part.drawn.all_logps_BV[torch.tensor(part.plan.told, device=part.drawn.ids_B.device)]
        most = min(max(sequence.params.top_logprobs for sequence in sequences), logps_AV.shape[1])
        logps_AK, ids_AK = (found.tolist() for found in logps_AV.topk(most))
        for sequence, ids, logps in zip(sequences, ids_AK, logps_AK, strict=True):
            n = sequence.params.top_logprobs
            _write(sequence.likeliest, self._n_drawn(sequence), dict(zip(ids[:n], logps[:n], strict=True)))

    def _note_sampling(
        self, rows_X: np.ndarray, ahead_X: np.ndarray, how: Sampling, drawn: Drawn, probs_XV: Tensor
    ) -> None:
        """Write down what each id was drawn from, where that is not the model's own distribution. It is to stand
        ahead_X places behind what its row has drawn so far."""
        sequences = [self._rows.sequence_in(row) for row in rows_X.tolist()]
        before = [self._n_drawn(sequence) + n for sequence, n in zip(sequences, ahead_X.tolist(), strict=True)]
        for sequence, n, logp in zip(sequences, before, sampled_logps(probs_XV, drawn.ids_B).tolist(), strict=True):
            if not sequence.params.is_plain:
                _write(sequence.sampled_logps, n, logp)
        if how.any_filter:
            for sequence, n, ids in zip(sequences, before, kept_ids(probs_XV), strict=True):
                if sequence.params.cuts:
                    _write(sequence.kept, n, ids)

    def _plan(self, rows_B: np.ndarray, version: int, device: torch.device) -> Plan:
        """Kept while the whole batch runs on unchanged."""
        rows = self._rows
        if self._kept is not None and self._kept[0] == version and len(self._kept[1].how.key_B) == len(rows_B):
            return self._kept[1]
        columns: dict[str, np.ndarray] = {
            "key_B": rows.key_R,
            "temperature_B": rows.temperature_R,
            "top_p_B": rows.top_p_R,
            "top_k_B": rows.top_k_R,
            "min_p_B": rows.min_p_R,
        }
        penalised_P = rows.penalties.is_on_R[rows_B].nonzero()[0]
        more = {place: self._sequence(rows_B, place) for place in (~rows.draws_freely_R[rows_B]).nonzero()[0].tolist()}
        plan = Plan(
            how=sampling(**{name: torch.from_numpy(column[rows_B]) for name, column in columns.items()}, device=device),
            penalised_P=penalised_P if len(penalised_P) else None,
            bias=rows.penalties.bias(rows_B, device) if rows.penalties.biases else None,
            told=[place for place, sequence in more.items() if sequence.params.top_logprobs],
            watched=[place for place, sequence in more.items() if sequence.search is not None],
        )
        if len(rows_B) == len(rows.active):
            self._kept = version, plan
        return plan

    def _sequence(self, rows_B: np.ndarray, place: int) -> Sequence:
        return self._rows.sequence_in(int(rows_B[place]))

    def _n_drawn(self, sequence: Sequence) -> int:
        return len(self._rows.drawn(sequence))


def _some(rows_B: np.ndarray, logits_BV: Tensor, places: np.ndarray) -> tuple[np.ndarray, Tensor]:
    if len(places) == len(rows_B):
        return rows_B, logits_BV
    return rows_B[places], logits_BV[torch.from_numpy(places).to(logits_BV.device)]


def _write(notes: list[T], n_before: int, note: T) -> None:
    """The note of id number n_before. One of a step that was cut short is written over."""
    del notes[n_before:]
    notes.append(note)
