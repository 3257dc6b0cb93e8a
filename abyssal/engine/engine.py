"""The engine: prompts in, tokens with log-probs out. (continuous batching, paged cache)

A step is schedule, run, draw: `scheduler.py` says who runs, `runner.py` computes, `sampler.py` draws. What a request
returns does not depend on its neighbours: its noise is keyed by its seed and positions, and each row is computed as
if alone, to rounding; to the last bit in invariant mode (`runner.py`).
Letters: B rows of a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from abyssal.engine.blocks import BlockPool, blocks_for, namespace_key
from abyssal.engine.control import Control, Controls
from abyssal.engine.disk_cache import DiskCache, DiskStats, DiskTier
from abyssal.engine.draft import Drafts, drafter_of
from abyssal.engine.draft_tuner import DraftStats
from abyssal.engine.drawing import Drawing, Ending
from abyssal.engine.grammar import Grammars
from abyssal.engine.guard import NOT_FINITE, Guard
from abyssal.engine.isolation import isolate, said
from abyssal.engine.limits import check_ids, check_params, check_sizes, check_step, default_blocks
from abyssal.engine.runner import Computed, Runner
from abyssal.engine.sampler import derive_seed
from abyssal.engine.scheduler import Admission, PrefixStats, Scheduler
from abyssal.engine.sequence import Rows, Sequence
from abyssal.engine.speculation import Proposal, Speculate, Speculation
from abyssal.engine.stop_strings import StopSearch
from abyssal.engine.thinking import AnswerNow, ThinkingControl, needed, phase_behind, thought
from abyssal.engine.vocabulary import Vocabulary
from abyssal.model.transformer import Transformer
from abyssal.types import Completion, SamplingParams, Structure, ThinkingLimits, ThinkingReport

MAX_ANSWERS = 128  # to one prompt, so that one request cannot ask for all there is
PREFILL_TOKENS = 8192  # padded prompt tokens of one step, so that a burst of prompts fits in memory


class Finished(NamedTuple):
    request_id: int
    completion: Completion


class QueueFull(ValueError):
    """Nothing is wrong with the request but its moment."""


class Engine:
    """`n_blocks` None: enough for max_batch sequences of full length, or what DEFAULT_CACHE_BYTES hold if that is less.

    Answers end at any of `eos_ids`. In FP32 the engine computes with the model's own weights; after changing them call
    `load_weights`, in any dtype. Ids from `vocab_size` on are padding of the model's vocabulary: for the engine they do
    not exist. `record_sampling` tells of each completion what it was drawn from, where that is not the model's own
    distribution.
    `prefill_chunk`: at most so many prompt tokens a step, so that a long prompt does not make running answers wait.
    `step_tokens`: at most so many tokens a step computes in all: of answers, prompts and drafts.
    `max_waiting`: so many requests may wait for their turn; `add` refuses more with `QueueFull`.
    `prefix_cache`: what earlier requests of a namespace left in the cache is used again where prompts begin alike
    (`prefix_stats`); None: where that changes no bit. With a `disk_cache` it survives the engine (`disk_stats`).
    `invariant`: a request's tokens and log-probs are the same bits alone or among others, with the cache cold or warm,
    in chunks or whole, preempted or not. So it always is on the native path; elsewhere it is slower (`runner.py`).
    `native`: compute in own C++ where it can be: on a CPU with a compiler, weights not in few bits (`native.py`). False
    is plain torch, True insists.
    `vocabulary`: for requests that limit their thinking or have stop strings; completions then tell how long they
    thought. `grammars`: for those whose answers have a structure.
    `speculate`: guess the next ids, by MTP modules or else by prompt look-up, and check several in one pass. "auto": as
    many as pay; a number: always so many. Changes no token and no log-prob (`draft_stats`).
    """

    def __init__(
        self,
        model: Transformer,
        *,
        eos_ids: Iterable[int],
        n_blocks: int | None = None,
        block_size: int = 64,
        max_batch: int = 256,
        record_experts: bool = True,
        record_sampling: bool = False,
        vocab_size: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        prefill_chunk: int | None = None,
        step_tokens: int | None = None,
        max_waiting: int | None = None,
        prefix_cache: bool | None = False,
        disk_cache: DiskCache | None = None,
        invariant: bool = False,
        native: bool | None = None,
        vocabulary: Vocabulary | None = None,
        grammars: Grammars | None = None,
        speculate: Speculate = "off",
    ) -> None:
        config = model.config
        check_sizes(
            block_size=block_size,
            max_batch=max_batch,
            prefill_tokens=prefill_tokens,
            prefill_chunk=prefill_chunk,
            max_waiting=max_waiting,
        )
        check_step(step_tokens, max_batch)
        if disk_cache is not None and not prefix_cache:
            raise ValueError(f"disk_cache={disk_cache.folder} keeps the prefix cache; give prefix_cache=True with it")
        self.max_length = config.max_position_embeddings
        max_blocks = blocks_for(self.max_length, block_size)
        if n_blocks is None:
            n_blocks = default_blocks(
                config, model.dtype, block_size=block_size, wanted=max_batch * max_blocks, at_least=max_blocks
            )
        if vocab_size is None and vocabulary is not None:
            vocab_size = len(vocabulary.bytes_of)
        self._vocab_size = config.vocab_size if vocab_size is None else min(vocab_size, config.vocab_size)
        if self._vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size} leaves no id to draw; give the tokenizer's")
        self._record_sampling, self._vocabulary, self._grammars = record_sampling, vocabulary, grammars
        self._is_eos_V = np.zeros(config.vocab_size, dtype=bool)
        for eos_id in eos_ids:
            check_ids([eos_id], self._vocab_size, what="eos_ids")
            self._is_eos_V[eos_id] = True
        self._runner = Runner(
            model,
            n_blocks=n_blocks,
            block_size=block_size,
            record_experts=record_experts,
            invariant=invariant,
            native=native,
            looks_ahead=config.num_nextn_predict_layers > 0 and speculate != "off",
        )
        self._tier = None if disk_cache is None else DiskTier(disk_cache, self._runner)
        self._rows = Rows(n_rows=max_batch, max_length=self.max_length, max_blocks=max_blocks)
        self._scheduler = Scheduler(
            pool=BlockPool(n_blocks),
            rows=self._rows,
            block_size=block_size,
            prefill_tokens=prefill_tokens,
            prefill_chunk=prefill_chunk,
            step_tokens=step_tokens,
            prefix_cache=self._runner.is_exact if prefix_cache is None else prefix_cache,
            tier=self._tier,
        )
        self._speculation: Speculation | None = None
        if speculate != "off":
            drafter = drafter_of(
                self._runner,
                self._rows,
                lambda rows_B, at_B, logits_BV: self._drawing.guess(rows_B, at_B, logits_BV, self._scheduler.version),
            )
            self._speculation = Speculation(drafter, self._rows, fixed=None if speculate == "auto" else speculate)
        self._sequences: dict[int, Sequence] = {}
        self._unclaimed: list[Finished] = []  # finished while `generate` was stepping for others
        self._next_id = 0
        self._max_waiting = max_waiting
        self._guard = Guard(self._runner, longest=prefill_tokens, vocab_size=self._vocab_size)
        self._drawing = Drawing(
            self._rows,
            vocab_size=self._vocab_size,
            is_eos_V=self._is_eos_V,
            record_sampling=record_sampling,
        )

    @property
    def n_free_blocks(self) -> int:
        return self._scheduler.pool.n_free

    @property
    def prefix_stats(self) -> PrefixStats:
        """Since the engine was made: tokens computed or found before an answer could go on, and those found."""
        return self._scheduler.stats

    @property
    def disk_stats(self) -> DiskStats | None:
        """What the disk cache holds and has done; None without one."""
        return None if self._tier is None else self._tier.stats

    @property
    def draft_stats(self) -> DraftStats | None:
        """What speculation has come to since the engine was made; None where it is off."""
        return None if self._speculation is None else self._speculation.stats

    @property
    def n_unfinished(self) -> int:
        return len(self._sequences)

    def add(
        self,
        prompt_ids: Seq[int],
        params: SamplingParams,
        *,
        control: Control | None = None,
        thinking: ThinkingLimits | None = None,
        namespace: str = "",
        priority: int = 0,
    ) -> int:
        """Queue a request; its answer comes out of a later `step`. An answer is cut where the context ends.

        `control` steers the draws of this request, and of no other; beside `thinking`, only those of the answer behind
        the thinking. What the cache holds for one `namespace` (a user, a key) is invisible to all others, in time as
        well. A higher `priority` goes first; within one, namespaces get equal shares (`fair_queue.py`).
        """
        if self._record_sampling and any(asked is not None for asked in (control, thinking, params.structure)):
            raise ValueError("an engine with record_sampling=True tells what ids were drawn from; it takes no control")
        scheduler, ids = self._scheduler, [int(i) for i in prompt_ids]
        if not ids:
            raise ValueError("the prompt is empty; begin with the begin-of-sentence token")
        if len(ids) >= self.max_length:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and leaves no room for an answer in a context of "
                f"{self.max_length}; shorten it to at most {self.max_length - 1}"
            )
        check_ids(ids, self._runner.config.vocab_size, what="the prompt")
        knows_text, records = self._vocabulary is not None, self._record_sampling
        check_params(params, vocab_size=self._vocab_size, knows_text=knows_text, records=records)
        limit = min(len(ids) + params.max_tokens, self.max_length)
        need = blocks_for(limit - 1, scheduler.block_size)  # the last token drawn is never computed
        if need > scheduler.pool.n_usable:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and max_tokens={params.max_tokens} need {need} cache "
                f"blocks of {scheduler.block_size}; there are {scheduler.pool.n_usable}; lower "
                f"max_tokens or give the engine n_blocks={need + 1} or more"
            )
        if self._max_waiting is not None and len(scheduler.waiting) >= self._max_waiting:
            raise QueueFull(
                f"{len(scheduler.waiting)} requests wait already, and max_waiting={self._max_waiting}; "
                "ask again when some have ended"
            )
        root = namespace_key(namespace)
        sequence = Sequence(self._next_id, ids, params, limit, control, root=root, priority=priority)
        if params.structure is not None:
            thinking = self._confine(sequence, params.structure, thinking)
        if thinking is not None:
            self._limit_thinking(sequence, thinking)
        request_id, self._next_id = self._next_id, self._next_id + 1
        if params.stop and self._vocabulary is not None:
            sequence.search = StopSearch(params.stop, self._vocabulary, prompt_ids=ids)
        self._sequences[request_id] = sequence
        scheduler.add(sequence)
        return request_id

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Admit who fits, then draw one token for every running sequence; returns those that ended."""
        finished, self._unclaimed = self._unclaimed, []
        try:
            with self._runner.alone():
                self._step(finished)
        except BaseException:  # Ctrl-C too: what was cut short is computed again, and nobody's answer is lost
            self._unclaimed = finished
            self._scheduler.preempt_all()
            overdue = [(sequence, self._drawing.overdue(sequence)) for sequence in self._sequences.values()]
            self._end([(sequence, ending) for sequence, ending in overdue if ending is not None], finished)
            raise
        return finished

    def _step(self, finished: list[Finished]) -> None:
        admission = self._scheduler.admit()
        if admission.prefills:
            self._prefill(admission, finished)
        if admission.copy_from:
            self._runner.copy_blocks(admission.copy_from, admission.copy_to)
        placed = [(sequence, prefix) for sequence, prefix in admission.placed if sequence.row is not None]
        if placed:
            rows_B = np.array([sequence.row for sequence, _ in placed])
            if self._speculation is not None:
                self._speculation.begin([prefix for _, prefix in placed], rows_B)
            logits_BV = torch.stack([_logits(prefix.logits_V) for _, prefix in placed])
            self._draw(rows_B, Drafts.none(len(rows_B)), logits_BV, finished)
        rows_B = self._scheduler.grow()
        if len(rows_B):
            self._decode(rows_B, finished)

    def _prefill(self, admission: Admission, finished: list[Finished]) -> None:
        """Compute what was admitted. A prompt that cannot be ends for all who ask it."""
        errors = self._guard.prefill(admission.prefills)
        good = [pair for place, pair in enumerate(admission.prefills) if place not in errors]
        self._scheduler.computed(admission._replace(prefills=good))
        for place, error in errors.items():
            prefix, _ = admission.prefills[place]
            placed = [sequence for sequence, own in admission.placed if own is prefix]
            self._end([(sequence, Ending("error", error)) for sequence in [*placed, *prefix.waiting]], finished)

    def _decode(self, rows_B: np.ndarray, finished: list[Finished]) -> None:
        """Compute and append one token of each row, and more where drafts are right."""
        proposal = Proposal.none(len(rows_B))
        if self._speculation is not None:
            proposal = self._speculation.propose(rows_B, self._scheduler.fit_drafts)

        def work(places: np.ndarray) -> tuple[np.ndarray, Drafts, Computed]:
            drafts = proposal.drafts.at(places)
            return places, drafts, self._computed(rows_B[places], drafts)

        done, errors = isolate(len(rows_B), work)
        for places, drafts, computed in done:
            start_B = self._rows.length_R[rows_B[places]]
            self._draw(rows_B[places], drafts, computed.logits_XV, finished)
            if self._speculation is not None:
                self._speculation.learn(rows_B[places], proposal.at(places), start_B, computed.hidden_XD)
        failed = [self._rows.sequence_in(int(rows_B[place])) for place in errors]
        self._end(zip(failed, (Ending("error", error) for error in errors.values()), strict=True), finished)

    def _computed(self, rows_B: np.ndarray, drafts: Drafts) -> Computed:
        rows = self._rows
        last_B1 = rows.length_R[rows_B, None] - 1
        ids_BT = np.concatenate((rows.ids_RT[rows_B[:, None], last_B1], drafts.ids_BK), axis=1)
        blocks_BN = rows.blocks_RN[rows_B, : int(rows.n_blocks_R[rows_B].max())]
        return self._runner.decode(ids_BT, last_B1 + np.arange(1 + drafts.most), blocks_BN, 1 + drafts.counts_B)

    def _draw(self, rows_B: np.ndarray, drafts: Drafts, logits_XV: Tensor, finished: list[Finished]) -> None:
        """Append one token to each of these rows, and more where drafts are right."""
        step = self._drawing.draw_runs(rows_B, drafts, logits_XV, version=self._scheduler.version)
        self._end(step.ended, finished)
        for sequence in step.not_finite:
            self._end(self._drawn_alone(sequence), finished)

    def _drawn_alone(self, sequence: Sequence) -> list[tuple[Sequence, Ending]]:
        """For one whose logits are not finite, by its own fault or another's."""
        rows, row = self._rows, sequence.row
        assert row is not None, f"request {sequence.request_id} is not running"
        try:
            computed = self._guard.alone(rows.ids_RT[row, : rows.length_R[row]], rows.blocks_of(row))
        except Exception as error:
            return [(sequence, Ending("error", said(error)))]
        step = self._drawing.draw(np.array([row]), computed.logits_XV, version=self._scheduler.version)
        return step.ended + [(sequence, Ending("error", NOT_FINITE)) for sequence in step.not_finite]

    def _end(self, ended: Iterable[tuple[Sequence, Ending]], finished: list[Finished]) -> None:
        for sequence, ending in ended:
            finished.append(self._finish(sequence, ending))

    def _finish(self, sequence: Sequence, ending: Ending) -> Finished:
        experts, failed = None, ending.reason == "error"
        blocks = self._rows.blocks_of(sequence.row) if sequence.row is not None else _blocks(sequence)
        if sequence.row is not None:
            experts = self._runner.experts_at(blocks, int(self._rows.length_R[sequence.row]) - 1)
        self._scheduler.remove(sequence, stale=failed)
        if failed:  # what it leaves behind must not trouble those who get its blocks
            self._guard.clean(self._scheduler.pool.idle(blocks))
        del self._sequences[sequence.request_id]
        return Finished(
            sequence.request_id,
            Completion(
                prompt_ids=sequence.prompt_ids,
                ids=sequence.ids.tolist(),
                logps=sequence.logps.tolist(),
                finish_reason=ending.reason,
                experts=experts,
                drawn_from=sequence.drawn_from() if self._record_sampling else None,
                error=ending.error,
                thinking=self._thought(sequence),
                stop=ending.stop,
                top_logprobs=sequence.likeliest if sequence.params.top_logprobs else None,
            ),
        )

    def abort(self, request_id: int) -> Completion | None:
        """Stop a request and free its blocks at once; returns what it had drawn, or None when it had already ended.

        Safe at any moment between two steps, whatever the request is at. Like all of the engine it belongs to the
        thread that steps: another one hands it the id and lets it call.
        """
        sequence = self._sequences.get(request_id)
        return None if sequence is None else self._finish(sequence, Ending("aborted")).completion

    def drawn(self, request_id: int) -> list[int]:
        """The ids drawn so far for a request that has not ended; none while it waits for its first turn."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            raise ValueError(f"request {request_id} has ended or never was; its ids came with its completion")
        return self._rows.drawn(sequence).tolist()

    def answer_now(self, request_id: int) -> AnswerNow:
        """Have a request close its thinking: the next ids it draws are its landing and </think>.

        "closing": so it does, or will if it begins to think at all; "answering": its answer has begun, or its control
        leaves no thinking; "ended": all of it is there, or it was never asked for.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return "ended"
        if sequence.thinking is None:
            if sequence.control is not None:
                return "answering"
            self._limit_thinking(sequence, ThinkingLimits(stop_loops=False))
        self._drawing.catch_up(sequence)
        assert sequence.thinking is not None
        return sequence.thinking.answer_now()

    def _confine(
        self, sequence: Sequence, structure: Structure, thinking: ThinkingLimits | None
    ) -> ThinkingLimits | None:
        """Give its answer a structure; returns how its thinking, which has none, is to be watched."""
        if self._grammars is None:
            raise ValueError("a structure needs an engine that knows text; give it grammars=Grammars(tokenizer)")
        if sequence.control is not None:
            raise ValueError("a request takes a structure or a control of its own, not both; leave one out")
        vocabulary = needed(self._vocabulary)
        phase = phase_behind(sequence.prompt_ids, vocabulary)
        sequence.control = self._grammars.control(structure)
        if phase == "may open" and not structure.may_think:
            return None
        is_watched = phase != "closed" and vocabulary.end_think_id is not None
        return ThinkingLimits(stop_loops=False) if thinking is None and is_watched else thinking

    def _limit_thinking(self, sequence: Sequence, limits: ThinkingLimits) -> None:
        """Before its first draw; or between two of them, where nothing controls it."""
        vocabulary = needed(self._vocabulary)
        sequence.thinking = thinking = ThinkingControl(limits, vocabulary, sequence.prompt_ids)
        answer = sequence.control
        sequence.control = thinking if answer is None else Controls(thinking, answer, end_ids=vocabulary.end_ids)
        if sequence.row is not None:
            self._rows.controlled_R[sequence.row] = True

    def _thought(self, sequence: Sequence) -> ThinkingReport | None:
        if sequence.thinking is not None:
            return sequence.thinking.report
        if self._vocabulary is None:
            return None
        return thought(sequence.prompt_ids, sequence.ids.tolist(), self._vocabulary)

    def generate(
        self,
        prompts: Seq[Seq[int]],
        params: SamplingParams | Seq[SamplingParams],
        *,
        n: int = 1,
        thinking: ThinkingLimits | None = None,
    ) -> list[Completion]:
        """`n` answers to each prompt, in the order of the prompts; equal prompts are computed once.

        One `params` for all: request i draws with a seed derived from (params.seed, i), so repeated prompts get
        different answers. A list of params, one a prompt, is taken as it is. The first of n answers is the one there
        is without n; the others draw with seeds derived from its seed and their number.
        One that cannot be computed is among them with its `error` (`Completion.checked`).
        """
        if not 1 <= n <= MAX_ANSWERS:
            raise ValueError(f"n={n} answers to a prompt; ask for 1 to {MAX_ANSWERS}")
        if isinstance(params, SamplingParams):
            params = [replace(params, seed=derive_seed(params.seed, i)) for i in range(len(prompts))]
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(params)} sampling params; give one, or one a prompt")
        asked = [
            (prompt, own if g == 0 else replace(own, seed=derive_seed(own.seed, g)))
            for prompt, own in zip(prompts, params, strict=True)
            for g in range(n)
        ]
        order: list[int] = []
        done: dict[int, Completion] = {}
        others: list[Finished] = []
        try:
            for prompt, own in asked:
                order.append(self.add(prompt, own, thinking=thinking))
            pending = set(order)
            while pending:
                for finished in self.step():
                    if finished.request_id in pending:
                        pending.remove(finished.request_id)
                        done[finished.request_id] = finished.completion
                    else:
                        others.append(finished)
        finally:  # an error or Ctrl-C leaves nothing behind, and loses nobody else's answer
            self._unclaimed += others
            for request_id in order:
                self.abort(request_id)
        return [done[request_id] for request_id in order]

    def load_weights(self, model: Transformer) -> None:
        """Go on with new weights: running requests keep what they have drawn and are recomputed."""
        self._scheduler.preempt_all()  # first: whatever happens from here on, nothing of the old weights is used again
        try:
            self._runner.load_weights(model)
        finally:
            if self._tier is not None:
                self._tier.reopen()
            if self._speculation is not None:
                self._speculation.tuner.reset()

    def close(self) -> None:
        """Write what is still to be written to the disk cache and let go of its folder. Happens at exit anyway."""
        if self._tier is not None:
            self._tier.close()


def _blocks(sequence: Sequence) -> np.ndarray:
    """Those kept for a waiting sequence and its siblings."""
    prefix = sequence.prefix
    return np.empty(0, np.int64) if prefix is None or prefix.blocks is None else prefix.blocks


def _logits(logits_V: Tensor | None) -> Tensor:
    assert logits_V is not None, "a placed sequence's prefix has been computed"
    return logits_V
