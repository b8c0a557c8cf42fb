"""The token bottleneck chooses one token of each segment, for its task, and learns by the soft choice's gradient."""

from __future__ import annotations

import pytest
import torch

from vlm.data.passages import gather_passages
from vlm.nn.selector import Selector
from vlm.types import Passage

DIM = 12


def build(**settings) -> Selector:
    torch.manual_seed(0)
    return Selector(**{"dim": DIM, "width": 16, "layers": 1, "heads": 2, "temperature": 1.0, **settings})


def passages(keep: int = 4):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (30,), generator=draw).tolist()
    return gather_passages([Passage(tuple(ids[:14]), tuple(ids[14:17])), Passage(tuple(ids[17:30]))], keep)


def embedded(of) -> torch.Tensor:
    return torch.randn(len(of.tokens), DIM, generator=torch.Generator().manual_seed(2))


def test_one_token_of_each_segment() -> None:
    of = passages()
    selector, tokens = build().eval(), embedded(of)
    picked, chosen = selector(tokens, of)
    assert picked.shape == (8, DIM)
    assert torch.equal(picked.detach(), tokens[chosen])
    for segment, place in zip(of.segments.tolist(), chosen.tolist()):
        assert place in [other for other in segment if other >= 0]
    assert torch.equal(chosen, of.segments.gather(1, selector.logits(tokens, of).argmax(1, keepdim=True))[:, 0])


def test_a_short_passage_stays_whole_in_its_order() -> None:
    of = gather_passages([Passage((9, 8, 7, 6), (5, 4))], keep=4)
    for selector in (build().eval(), build().train()):
        _, chosen = selector(embedded(of), of)
        assert chosen.tolist() == [0, 1, 2, 3]


def test_training_draws_and_tests_do_not() -> None:
    of = passages()
    tokens, selector = embedded(of), build()
    torch.manual_seed(3)
    drawn = {tuple(selector(tokens, of)[1].tolist()) for _ in range(20)}
    assert len(drawn) > 5
    torch.manual_seed(3)
    assert tuple(selector(tokens, of)[1].tolist()) in drawn  # from torch's generator, which the trainer seeds each step
    selector.eval()
    assert len({tuple(selector(tokens, of)[1].tolist()) for _ in range(5)}) == 1


def test_draws_follow_the_scores() -> None:
    """Gumbel-max: a token is drawn as often as the softmax of the scores says, whatever the temperature."""
    of = gather_passages([Passage((4, 5, 6))] * 4000, keep=1)
    selector = build(temperature=0.3)
    tokens = torch.randn(7, DIM, generator=torch.Generator().manual_seed(2))[of.tokens]
    want = selector.logits(tokens, of).softmax(1)[0]
    torch.manual_seed(5)
    with torch.no_grad():
        drawn = selector(tokens, of)[1] % 3
    assert torch.allclose(torch.bincount(drawn, minlength=3) / 4000, want, atol=0.03)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gradient_is_that_of_the_soft_mixture(temperature: float) -> None:
    """The value is the hard choice's, to the bit; the gradient is what reading the softmax' mixture would give."""
    of = passages()
    tokens = embedded(of).double()
    weights = torch.randn(8, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    selector = build(temperature=temperature).double()
    torch.manual_seed(6)
    picked, chosen = selector(tokens, of)
    assert torch.equal(picked.detach(), tokens[chosen])
    (picked * weights).sum().backward()
    got = {name: p.grad.clone() for name, p in selector.named_parameters()}
    selector.zero_grad()
    torch.manual_seed(6)
    logits = selector.logits(tokens, of)
    noise = -torch.empty_like(logits).exponential_().log()
    soft = ((logits + noise) / temperature).softmax(1)
    mixture = torch.stack([
        sum(soft[row, column].double() * tokens[place] for column, place in enumerate(segment) if place >= 0)
        for row, segment in enumerate(of.segments.tolist())
    ])  # fmt: skip
    (mixture * weights).sum().backward()
    for name, p in selector.named_parameters():
        assert p.grad.any(), name
        assert torch.allclose(got[name], p.grad, rtol=1e-5, atol=1e-9), name


def test_it_learns_what_to_choose() -> None:
    """The token that the task names by its first number: chosen in every segment of passages not seen before."""
    draw = torch.Generator().manual_seed(8)

    def sample(count: int) -> tuple:
        of = gather_passages([Passage(tuple(range(12)), (12,)) for _ in range(count)], keep=3)
        tokens = torch.randn(len(of.tokens), DIM, generator=draw)
        sign = torch.randint(2, (count,), generator=draw) * 2.0 - 1
        tokens.view(count, 13, DIM)[:, 12, 0] = 3 * sign
        return of, tokens, sign.repeat_interleave(3)

    selector = build(width=32)
    optimizer = torch.optim.AdamW(selector.parameters(), lr=5e-3)
    torch.manual_seed(0)
    for _ in range(150):
        of, tokens, sign = sample(16)
        picked, _ = selector(tokens, of)
        optimizer.zero_grad()
        (-(picked[:, 1] * sign).mean()).backward()
        optimizer.step()
    of, tokens, sign = sample(400)
    best = (tokens[of.segments][..., 1] * sign[:, None]).argmax(1)
    _, chosen = selector.eval()(tokens, of)
    hit = (chosen == of.segments.gather(1, best[:, None])[:, 0]).float().mean()
    assert float(hit) > 0.7  # by chance 0.25; seen: 0.85 to 0.91, as seeds and processors go


def test_the_task_decides_and_other_segments_do_not() -> None:
    """Scores follow the task; they do not follow what stands in other segments, passages or after a segment's end."""
    selector = build().eval()
    caption = (9, 8, 7, 6, 5, 4, 11)
    table = torch.randn(80, DIM, generator=torch.Generator().manual_seed(7))

    def scores(*of: Passage) -> torch.Tensor:
        gathered = gather_passages(of, keep=2)
        return selector.logits(table[gathered.tokens], gathered).detach()

    plain = scores(Passage(caption, (20, 21)))
    assert not torch.allclose(plain[:, :3], scores(Passage(caption, (20, 22)))[:, :3], atol=1e-3)
    among = scores(Passage(tuple(range(30, 55)), (60, 61, 62, 63)), Passage(caption, (20, 21)))
    assert torch.allclose(among[2:, :3], plain[:, :3], atol=1e-6)
    changed = scores(Passage((*caption[:3], 40, 41, 42, 43), (20, 21)))
    assert torch.allclose(changed[0], plain[0], atol=1e-6)
    assert not torch.allclose(changed[1], plain[1], atol=1e-3)


def test_half_precision() -> None:
    of = passages()
    selector, tokens = build().bfloat16(), embedded(of).bfloat16()
    picked, chosen = selector(tokens, of)
    assert picked.dtype == torch.bfloat16
    assert torch.equal(picked.detach(), tokens[chosen])
    picked.float().square().sum().backward()
    assert all(p.grad.any() for p in selector.parameters())


def test_size_beside_the_published_language_model() -> None:
    """The paper says 0.7 million."""
    with torch.device("meta"):
        selector = Selector(dim=4096, width=128, layers=1, heads=4, temperature=1.0)
    assert sum(p.numel() for p in selector.parameters()) == 721_664
