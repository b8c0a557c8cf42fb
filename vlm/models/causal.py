"""What all systems on a causal language model share: splicing, the language model, losses, scoring of options.

A system is one hook, `encode_video`. Rows of text come packed (vlm.data.packing): all views of a micro-batch go through
the language model in one pass, without padding, and the vocabulary is scored at the places that are learnt alone.

A view's name is its loss's name. Every view is a mean over the tokens to be predicted unless a system says otherwise.
Letters: B videos, N video tokens, S tokens of all rows, M slots, Z tokens to be predicted, D width, K options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from vlm.models.system import Cost, System
from vlm.nn.language import make_spans, make_wanted
from vlm.nn.llama_layers import can_narrow, last_block_savings
from vlm.nn.splice import splice
from vlm.types import Batch, Losses, LossTerm, TextRows, UserError

NO_ANSWER = torch.finfo(torch.float32).min
"""Score of an option that has no tokens to be predicted, or is not there: finite, and below every other."""


class CausalSystem(System):
    """Video tokens spliced into text before a frozen causal language model."""

    llm: PreTrainedModel
    reads_text = True

    def __init__(self, llm: PreTrainedModel, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.llm = llm
        if activation_checkpointing:
            # non-reentrant: the reentrant kind loses gradients in silence where a block's input is frozen
            llm.gradient_checkpointing_enable({"use_reentrant": False})

    def encode_video(self, batch: Batch) -> Tensor | None:
        """(B, N, D) video tokens of the batch; None: it has no video.

        The same modules must run in the same order whatever number of videos and frames there is (vlm.run.modalities).
        """
        raise NotImplementedError

    def fill(self, text: Tensor, rows: TextRows, batch: Batch) -> Tensor:
        """Embedded rows (S, D), in which a system may put what it chose or made in the place of some; same shape."""
        if rows.pick_slots.numel():
            raise UserError(
                f"{', '.join(batch.keys)}: the rows leave places for chosen caption tokens (inputs.keep_tokens), but "
                "this model has no selector (model.selector) to choose them"
            )
        return text

    def arrange(self, batch: Batch) -> Batch:
        """The batch as its losses are to be worked out: a system may lay its views' rows out anew, with as many
        predictions as before."""
        return batch

    def block_arguments(self, names: Sequence[str], rows: Sequence[TextRows], batch: Batch) -> dict[str, Any]:
        """What the blocks get besides the spans, for rows of the views of these names, end to end."""
        return {}

    def places(self, name: str, rows: TextRows) -> Tensor:
        """Places (Z,) int64 among a view's rows whose outputs its loss reads; each once costs least."""
        return rows.predictors

    def view_loss(self, name: str, rows: TextRows, hidden: Tensor, batch: Batch) -> LossTerm | None:
        """A view's own loss from the normed outputs (Z, D) at its `places`; None: it predicts its tokens, as usual."""
        return None

    def predictions_of(self, name: str, rows: TextRows) -> int:
        """How many elements `view_loss` sums."""
        return rows.targets.numel()

    # ------------------------------------------------------------------------------------------ what a trainer calls

    def losses(self, batch: Batch) -> Losses:
        """Every view of the batch: summed cross-entropy and number of its predictions."""
        if not batch.views:
            raise UserError(f"{', '.join(batch.keys)}: a batch without text reached a language model; check the views")
        batch = self.arrange(batch)
        names, rows = list(batch.views), list(batch.views.values())
        places = [self.places(name, part) for name, part in zip(names, rows)]
        hidden = self.read_at(names, rows, places, batch)
        own = {n: self.view_loss(n, part, out, batch) for n, part, out in zip(names, rows, hidden)}
        tokens = [name for name in names if own[name] is None]
        nll = self.nll([out for n, out in zip(names, hidden) if n in tokens], [batch.views[n] for n in tokens])
        summed = dict(zip(tokens, nll))
        return {
            name: LossTerm(summed[name].sum(), len(summed[name])) if term is None else term
            for name, term in own.items()
        }

    def counts(self, batch: Batch) -> dict[str, int]:
        """View name -> elements that its loss sums."""
        return {name: self.predictions_of(name, rows) for name, rows in batch.views.items()}

    def scores(self, batch: Batch) -> Tensor:
        """(questions, K) fp32: minus the mean loss over each option's predicted tokens, so the best is the largest.

        An option without such tokens, or a question's missing option, has `NO_ANSWER`.
        """
        rows = batch.options
        if rows is None or not rows.leaves:
            raise UserError(f"{', '.join(batch.keys)}: no options to choose from; this data has no questions")
        nll = self.nll(self.read_at(["options"], [rows], [rows.predictors], batch), [rows])[0]
        counts = torch.tensor(rows.target_counts, device=nll.device)
        owner = torch.arange(len(rows.lengths), device=nll.device).repeat_interleave(counts, output_size=len(nll))
        sums = torch.zeros(len(rows.lengths), device=nll.device).index_add(0, owner, nll)
        paths = [[_path(leaf, rows.parents) for leaf in question] for question in rows.leaves]
        scores = sums.new_full((len(paths), max(map(len, paths))), NO_ANSWER)
        for number, question in enumerate(paths):
            for option, path in enumerate(question):
                count = sum(rows.target_counts[row] for row in path)
                if count:
                    scores[number, option] = -sums[path].sum() / count
        return scores

    # ------------------------------------------------------------------------------------------ the pass itself

    def read(
        self, names: Sequence[str], rows: Sequence[TextRows], batch: Batch, places: Tensor | None = None
    ) -> Tensor:
        """Normed outputs of the language model for the rows of several views end to end.

        Args:
            places: (Z,) int64 among all rows' tokens, the outputs to return; None: all of them.
        Returns:
            (S, D), or (Z, D) at `places`.
        """
        joined = join(rows)
        text = self.embed(joined, batch)
        arguments = self.block_arguments(names, rows, batch)
        narrow = places is not None and self._narrows(len(places), len(text))
        if places is not None and narrow:
            arguments["wanted"] = make_wanted(places, joined.lengths, joined.parents, joined.blind)
        hidden = self.llm.base_model(
            inputs_embeds=text[None],
            position_ids=joined.positions[None],
            # a mask of four dimensions is passed on as it is; the spans say what is seen
            attention_mask=text.new_empty(1, 1, 0, 0),
            use_cache=False,
            spans=make_spans(joined.lengths, joined.parents, text.device, joined.blind),
            **arguments,
        ).last_hidden_state[0]
        return hidden if places is None or narrow else hidden[places]

    def embed(self, rows: TextRows, batch: Batch) -> Tensor:
        """(S, D): embedded rows, with video and what else the system makes in their places."""
        video = self.encode_video(batch)
        text = self.llm.get_input_embeddings()(rows.tokens)
        if video is not None:
            text = splice(text, video, rows.slots, rows.sources)
        elif rows.slots.numel():
            raise UserError(f"{', '.join(batch.keys)}: the text has places for video, but the batch has no features")
        return self.fill(text, rows, batch)

    def _narrows(self, places: int, tokens: int) -> bool:
        """Whether a pass for so many places is worth a narrowed last block, whose mask is places x tokens."""
        return can_narrow(self.llm) and 0 < 2 * places <= tokens  # attention kernels want at least one query

    def read_at(
        self, names: Sequence[str], rows: Sequence[TextRows], places: Sequence[Tensor], batch: Batch
    ) -> list[Tensor]:
        """Normed outputs (Z, D) at places (Z,) of each view's rows, one pass; a place in several views or several times
        in one is worked out once."""
        starts = accumulate((sum(part.lengths) for part in rows), initial=0)
        wanted = torch.cat([where + start for where, start in zip(places, starts)])
        sizes = [len(where) for where in places]
        if all(max(part.parents) < 0 for part in rows):  # only rows that share a beginning read a place twice
            return list(self.read(names, rows, batch, wanted).split(sizes))
        once, number = wanted.unique(return_inverse=True)
        return list(self.read(names, rows, batch, once)[number].split(sizes))

    def token_losses(self, hidden: Sequence[Tensor], rows: Sequence[TextRows]) -> list[Tensor]:
        """Cross-entropy (Z,) fp32 of each view's predicted tokens, from outputs (S, D) of all its tokens."""
        return self.nll([out[part.predictors] for out, part in zip(hidden, rows)], rows)

    def nll(self, picked: Sequence[Tensor], rows: Sequence[TextRows]) -> list[Tensor]:
        """Cross-entropy (Z,) fp32 of each view's predicted tokens, from the outputs (Z, D) at its predictors and one
        pass through the output layer."""
        if not rows:
            return []
        targets = torch.cat([part.targets for part in rows])
        nll = functional.cross_entropy(self.logits(torch.cat(list(picked))), targets, reduction="none")
        return list(nll.split([part.targets.numel() for part in rows]))

    def logits(self, hidden: Tensor) -> Tensor:
        """(Z, D) normed outputs -> (Z, words) fp32."""
        head = self.llm.get_output_embeddings()
        assert isinstance(head, nn.Module)
        return head(hidden).float()

    def trainable(self, name: str) -> bool:
        """All but the language model."""
        return not name.startswith("llm.")

    def reached(self, name: str, batch: Batch) -> bool:
        """What trains makes video tokens, unless a system says otherwise: rows with places for them reach it. A batch
        without video runs all of it on a blank one (vlm.run.modalities), whose gradients are 0."""
        return any(rows.slots.numel() and self.predictions_of(view, rows) for view, rows in batch.views.items())

    def cost(self, batch: Batch) -> Cost:
        """What the forward pass over this batch's views costs."""
        rows = join(list(batch.views.values()))
        size = self.llm.config
        tokens = sum(rows.lengths)
        linear = sum(m.in_features * m.out_features for m in self.llm.base_model.modules() if isinstance(m, nn.Linear))
        # the last block's queries and feed-forward part run at the places that are read alone
        places = min(tokens, sum(self.predictions_of(name, part) for name, part in batch.views.items()))
        unread = tokens - places if self._narrows(places, tokens) else 0
        saved = unread * last_block_savings(self.llm) if unread else 0
        frozen = 2.0 * (tokens * linear - saved) + 2.0 * rows.targets.numel() * size.hidden_size * size.vocab_size
        pairs = sum(length * (length + 1) / 2 for length in rows.lengths)
        for length, parent in zip(rows.lengths, rows.parents):
            pairs += length * sum(rows.lengths[row] for row in _path(parent, rows.parents))
        last = places * tokens if unread else pairs
        scores = 4.0 * (pairs * (size.num_hidden_layers - 1) + last) * size.hidden_size
        return Cost(tokens, scores + self.trained_flops(batch, tokens), frozen)

    def trained_flops(self, batch: Batch, tokens: int) -> float:
        """Forward FLOPs of the trained part alone."""
        return 0.0


def join(rows: Sequence[TextRows]) -> TextRows:
    """Rows of several views end to end, as one."""
    assert rows
    if len(rows) == 1:
        return rows[0]
    tokens, counts = [0], [0]
    for part in rows:
        tokens.append(tokens[-1] + sum(part.lengths))
        counts.append(counts[-1] + len(part.lengths))
    return replace(
        rows[0],
        **{
            name: torch.cat([getattr(p, name) for p in rows])
            for name in ("tokens", "positions", "sources", "targets", "after_video", "pick_sources")
        },
        **{
            name: torch.cat([getattr(p, name) + start for p, start in zip(rows, tokens)])
            for name in ("slots", "predictors", "pick_slots")
        },
        lengths=tuple(length for part in rows for length in part.lengths),
        parents=tuple(
            parent + (start if parent >= 0 else 0) for part, start in zip(rows, counts) for parent in part.parents
        ),
        target_counts=tuple(count for part in rows for count in part.target_counts),
        leaves=(),
        blind=tuple(place + start for part, start in zip(rows, tokens) for place in part.blind),
    )


def _path(row: int, parents: Sequence[int]) -> list[int]:
    """A row and its ancestors; nothing for -1."""
    path = []
    while row >= 0:
        path.append(row)
        row = parents[row]
    return path
