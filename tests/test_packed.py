"""Qwen-Image-2.1 over packed rows gives diffusers' numbers, for prompts of any length.

Several targets behind one prefix are in tests/test_draws_per_row.py.
"""

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_qie.models.qwen_image_21.packed import Packing, QwenImage21Transformer2DModel, RowLayout
from hf_qie.models.qwen_image_21.pieces import SliceSpans
from hf_qie.models.qwen_image_21.transformer import attention_pairs, predict

SHAPE = {"num_attention_heads": 4, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
SHAPE |= {"num_layers": 3, "context_in_dim": 48}
# grids of the sources, and how many of the prompt's embeddings stand in front of each; two sources may touch
TEXT_ALONE = ([], [])
ONE = ([(4, 6)], [3])
THREE = ([(4, 6), (2, 2), (6, 4)], [3, 3, 8])
TARGET = (4, 4)


def transformers(**options) -> list[torch.nn.Module]:
    """diffusers' transformer and ours, of the same weights, which make every input show in the output."""
    torch.manual_seed(0)
    stock = diffusers.QwenImage21Transformer2DModel(**SHAPE, **options)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
            parameter += 2 if ".attn.norm_" in name else 0  # sharp attention, so that positions show
    ours = QwenImage21Transformer2DModel(**SHAPE, **options)
    ours.load_state_dict(stock.state_dict())
    return [stock, ours]


def batch_of(sources, slots, lengths, *, seed=0) -> dict:
    """Rows of one shape whose prompts have `lengths`, as collate.py pads them."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    embeds = draw(len(lengths), max(lengths), SHAPE["context_in_dim"])
    for row, length in enumerate(lengths):
        embeds[row, length:] = 0
    return {
        "prompt_embeds": embeds,
        "prompt_lengths": lengths,
        "image_slots": [slots] * len(lengths),
        "source_latents": draw(len(lengths), sum(height * width for height, width in sources), 64),
        "grids": [TARGET, *sources],
        "noised": draw(len(lengths), TARGET[0] * TARGET[1], 64),
    }


def one_row(batch: dict, row: int) -> dict:
    """A batch of one of its rows, without padding."""
    length = batch["prompt_lengths"][row]
    return {
        "prompt_embeds": batch["prompt_embeds"][row : row + 1, :length],
        "prompt_lengths": [length],
        "image_slots": batch["image_slots"][row : row + 1],
        "source_latents": batch["source_latents"][row : row + 1],
        "grids": batch["grids"],
    }


def by_diffusers(model, batch: dict, noised: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The velocity of a batch of one row by diffusers' forward, called as its pipeline calls it.

    Image slots hold noise, as diffusers puts the latents in their places.
    """
    (length,), (slots,), (target, *sources) = batch["prompt_lengths"], batch["image_slots"], batch["grids"]
    is_image, before = [], 0
    for slot, (height, width) in zip(slots, sources, strict=True):
        is_image += [False] * (slot - before) + [True] * (height * width // 4)
        before = slot
    mask = torch.tensor([is_image + [False] * (length - before)])
    embeds = torch.randn(1, mask.shape[1], batch["prompt_embeds"].shape[2])
    embeds[~mask] = batch["prompt_embeds"][0]
    of_target = torch.ones(1, target[0] * target[1] // 4, dtype=torch.bool)
    (output,) = model(
        hidden_states=torch.cat([batch["source_latents"], noised], dim=1),
        encoder_hidden_states=embeds,
        timestep=sigma,
        img_shapes=[[(1, *grid) for grid in (*sources, target)]],
        img_mask=torch.cat([mask, of_target], dim=1),
        return_dict=False,
    )
    return output[:, -noised.shape[1] :]


def to_meta(batch: dict) -> dict:
    return {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sources, slots", [TEXT_ALONE, ONE, THREE])
def test_the_velocity_is_diffusers(sources, slots, causal):
    stock, ours = transformers(causal_condition=causal)
    batch = batch_of(sources, slots, [11])
    noised, sigma = batch.pop("noised"), torch.tensor([0.37])
    with torch.no_grad():
        expected = by_diffusers(stock, batch, noised, sigma)
        assert relative(predict(ours, batch, noised, sigma), expected) < 1e-5
        other = batch | {"prompt_embeds": batch["prompt_embeds"].flip(2)}
        assert relative(predict(ours, other, noised, sigma), expected) > 1e-2  # or nothing would show


@pytest.mark.parametrize("sources, slots", [TEXT_ALONE, THREE])
def test_rows_of_unequal_prompts_in_a_batch_are_what_they_are_alone(sources, slots):
    stock, ours = transformers()
    batch = batch_of(sources, slots, [9, 17, 8])
    noised, sigma = batch.pop("noised"), torch.tensor([0.2, 0.9, 0.5])
    with torch.no_grad():
        together = predict(ours, batch, noised, sigma)
        for row in range(3):
            alone = by_diffusers(stock, one_row(batch, row), noised[row : row + 1], sigma[row : row + 1])
            assert relative(together[row : row + 1], alone) < 1e-5


def test_diffusers_own_batch_of_unequal_prompts_is_wrong():
    """Why there is a forward of our own; once this fails, look whether it is still needed."""
    stock, _ = transformers()
    batch = batch_of(*TEXT_ALONE, [9, 5])
    noised, sigma = batch.pop("noised"), torch.tensor([0.5, 0.5])
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    with torch.no_grad():
        (together,) = stock(
            hidden_states=noised,
            encoder_hidden_states=batch["prompt_embeds"],
            encoder_hidden_states_mask=mask,
            timestep=sigma,
            img_shapes=[[(1, *TARGET)]] * 2,
            img_mask=torch.cat([torch.zeros(2, 9), torch.ones(2, 4)], dim=1).bool(),
            return_dict=False,
        )
        for row, least, most in ((0, 0, 1e-5), (1, 0.03, 2)):
            alone = by_diffusers(stock, one_row(batch, row), noised[row : row + 1], sigma[row : row + 1])
            assert least <= relative(together[row : row + 1, -16:], alone) < most


def test_a_prefix_that_depends_on_the_noise_takes_one_target():
    _, ours = transformers(causal_condition=False)
    batch = batch_of(*TEXT_ALONE, [5])
    with pytest.raises(AssertionError, match="depends on the noise level"):
        predict(ours, batch, batch["noised"].expand(2, -1, -1), torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize("sources, slots", [TEXT_ALONE, THREE])
def test_positions_are_those_of_diffusers(sources, slots):
    stock, ours = transformers()
    row = RowLayout(target=(3, 5), sources=tuple(sources), num_text=11, slots=tuple(slots))
    image = torch.tensor([bool(grid) for length, grid in row.segments for _ in range(length)] + [True] * 15)
    expected = stock.pos_embed([(1, *grid) for grid in (*sources, (3, 5))], image, torch.device("cpu"))
    torch.testing.assert_close(ours.rotary([row], 1, torch.device("cpu")), expected, atol=1e-6, rtol=0)


def packing_of(sources, slots, num_targets, *, causal=True) -> Packing:
    """Of two rows, whose prompts have 9 and 12 embeddings."""
    layout = {"target": TARGET, "sources": tuple(sources), "slots": tuple(slots)}
    rows = [RowLayout(num_text=length, **layout) for length in (9, 12)]
    on = {"dtype": torch.float64, "device": torch.device("cpu")}
    return Packing(rows, num_targets=num_targets, causal=causal, **on)


LAYOUTS = pytest.mark.parametrize(
    ("sources", "slots", "num_targets", "causal"),
    [(*TEXT_ALONE, 1, False), (*TEXT_ALONE, 1, True), (*TEXT_ALONE, 3, True), (*THREE, 3, True)],
)


@LAYOUTS
def test_tokens_are_scaled_by_the_factors_of_their_noise_level(sources, slots, num_targets, causal):
    packing, prefix = packing_of(sources, slots, num_targets, causal=causal), sum(h * w for h, w in sources)
    levels = []
    for row, length in enumerate((9, 12)):
        own = [row * num_targets + place for place in range(num_targets)]
        levels += [-1 if causal else row] * (prefix + length) + [level for level in own for _ in range(16)]
    torch.manual_seed(0)
    tokens = torch.randn(1, len(levels), 2, dtype=torch.float64, requires_grad=True)
    factors = torch.randn(2 * num_targets + causal, 2, dtype=torch.float64, requires_grad=True)
    scaled, expected = packing.scale(tokens, factors), tokens * factors[levels]
    assert torch.equal(scaled, expected)
    weights = torch.randn_like(scaled)
    ours, theirs = (torch.autograd.grad(found, (tokens, factors), weights) for found in (scaled, expected))
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-12, atol=1e-12)


def test_of_frozen_factors_nothing_is_kept_for_each_token():
    packing, tokens = packing_of(*ONE, 2), torch.ones(1, 133, 2, requires_grad=True)
    for frozen in (True, False):
        factors = torch.ones(5, 2, requires_grad=not frozen)
        kept = [one for one in packing.scale(tokens, factors).grad_fn.saved_tensors if one is not None]
        assert [one.shape for one in kept] == ([factors.shape] if frozen else [tokens.shape, factors.shape])


@LAYOUTS
def test_the_gradient_of_keys_is_that_of_slices(sources, slots, num_targets, causal):
    spans = packing_of(sources, slots, num_targets, causal=causal).key_spans
    torch.manual_seed(0)
    tokens = torch.randn(1, max(end for _, end in spans), 2, 2, dtype=torch.float64, requires_grad=True)
    found, expected = SliceSpans.apply(tokens, spans), [tokens[:, start:end] for start, end in spans]
    assert all(map(torch.equal, found, expected))
    weights = [torch.randn_like(one) for one in expected]
    (ours,), (theirs,) = (torch.autograd.grad(pieces, tokens, weights) for pieces in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_targets", [1, 3])
@pytest.mark.parametrize("sources, slots", [TEXT_ALONE, THREE])
def test_pairs_are_what_attention_multiplies(sources, slots, num_targets):
    _, ours = transformers()
    batch = batch_of(sources, slots, [9, 12])
    noised = batch.pop("noised").repeat_interleave(num_targets, dim=0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        predict(ours.to("meta"), to_meta(batch), noised.to("meta"), torch.empty(len(noised), device="meta"))
    products = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for name, flops in products.items() if "attention" in name or "bmm" in name)
    width = SHAPE["num_attention_heads"] * SHAPE["attention_head_dim"]
    pairs = attention_pairs(batch["grids"], batch["prompt_lengths"], batch["image_slots"], num_targets)
    assert attention == 4 * width * pairs * SHAPE["num_layers"]  # two products, two operations each


def test_what_is_saved_is_diffusers_own(tmp_path):
    stock, ours = transformers()
    ours.save_pretrained(tmp_path)
    back = diffusers.AutoModel.from_pretrained(str(tmp_path))
    assert type(back) is diffusers.QwenImage21Transformer2DModel and dict(back.config)["num_layers"] == 3
    for name, tensor in stock.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)


def test_it_runs_without_data_and_never_asks_the_device():
    """On the meta device every question to a tensor fails."""
    with torch.device("meta"):
        model = QwenImage21Transformer2DModel(**SHAPE)
        batch = to_meta(batch_of(*THREE, [9, 12]))
        velocity = predict(model, batch, batch["noised"].repeat(2, 1, 1), torch.empty(4))
    assert velocity.shape == (4, 16, 64) and velocity.device.type == "meta"
    velocity.sum().backward()
