"""A batch of unequal prompts runs attention row by row and without a mask, and gives diffusers' numbers."""

from collections import Counter

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_qie.models.qwen_image.attention import RowAttention
from hf_qie.models.qwen_image.transformer import predict
from hf_qie.training.model import compile_blocks

SHAPE = {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
SHAPE |= {"joint_attention_dim": 48, "in_channels": 64}
TARGET, SOURCES = (4, 4), [(4, 6), (2, 2)]
LENGTHS = (9, 17, 1, 9)
both = pytest.mark.parametrize("zero_cond_t", [False, True], ids=["2509", "2511"])


class Attention(TorchFunctionMode):
    """Counts calls of SDPA, with a mask and without one."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.calls["masked" if kwargs["attn_mask"] is not None else "plain"] += 1
        return function(*args, **(kwargs or {}))


def transformers(**options) -> list[nn.Module]:
    """diffusers' transformer and one with our attention, of the same weights, which make every input show."""
    torch.manual_seed(0)
    options = SHAPE | options
    stock = QwenImageTransformer2DModel(**options)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
            parameter += 2 if ".attn.norm_" in name else 0  # sharp attention, so that positions show
    ours = QwenImageTransformer2DModel(**options)
    ours.load_state_dict(stock.state_dict())
    ours.set_attn_processor(RowAttention())
    return [stock, ours]


def batch_of(lengths=LENGTHS) -> dict:
    """Rows with two sources; what is padding holds numbers, which nothing may see."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "prompt_embeds": (max(lengths), 48),
        "source_latents": (sum(height * width for height, width in SOURCES), 64),
        "noised": (TARGET[0] * TARGET[1], 64),
    }
    tensors = {name: torch.randn(len(lengths), *shape, generator=generator) for name, shape in shapes.items()}
    return {"prompt_lengths": list(lengths), "grids": [TARGET, *SOURCES], **tensors}


def by_diffusers(model: nn.Module, batch: dict, sigma: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The velocity by diffusers' forward, called as its pipeline calls it."""
    (output,) = model(
        hidden_states=torch.cat([batch["noised"], batch["source_latents"]], dim=1),
        encoder_hidden_states=batch["prompt_embeds"],
        encoder_hidden_states_mask=mask,
        timestep=sigma,
        img_shapes=[[(1, *grid) for grid in batch["grids"]]] * len(sigma),
        return_dict=False,
    )
    return output[:, : batch["noised"].shape[1]]


def row_by_row(model: nn.Module, batch: dict, sigma: Tensor) -> Tensor:
    """The same of each row alone, without its padding."""
    found = []
    for row, length in enumerate(batch["prompt_lengths"]):
        one = {name: value[row : row + 1] for name, value in batch.items() if isinstance(value, Tensor)}
        one |= {"prompt_embeds": one["prompt_embeds"][:, :length], "grids": batch["grids"]}
        found.append(by_diffusers(model, one, sigma[row : row + 1]))
    return torch.cat(found)


def masked(model: nn.Module, batch: dict, sigma: Tensor) -> Tensor:
    """The same of diffusers' own padded batch."""
    lengths = torch.tensor(batch["prompt_lengths"])
    return by_diffusers(model, batch, sigma, mask=torch.arange(max(lengths)) < lengths[:, None])


def by_rows(model: nn.Module, batch: dict, sigma: Tensor) -> Tensor:
    return predict(model, batch, batch["noised"], sigma)


def outcome(way, model: nn.Module, lengths=LENGTHS) -> dict[str, Tensor]:
    """Velocity and gradients of parameters and prompts."""
    batch, weights = batch_of(lengths), torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(1))
    batch["prompt_embeds"].requires_grad_()
    model.zero_grad()
    velocity = way(model, batch, torch.tensor([0.1, 0.5, 0.9, 0.3]))
    (velocity * weights).sum().backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {"velocity": velocity.detach(), "prompts": batch["prompt_embeds"].grad, **gradients}


@both
@pytest.mark.parametrize("way", [row_by_row, masked])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_velocity_and_gradients_are_diffusers(zero_cond_t, way, checkpointed):
    stock, ours = transformers(zero_cond_t=zero_cond_t)
    if checkpointed:
        ours.train().enable_gradient_checkpointing()
    expected, found = outcome(way, stock), outcome(by_rows, ours)
    # those of the last text are zero where there is no padding, and None where nothing follows
    assert found.keys() == expected.keys() and len(found) > 60
    for name, value in expected.items():
        # float32 attention over another length adds up in another order
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=name)
    assert not any(prompt[n:].any() for prompt, n in zip(found["prompts"], LENGTHS, strict=True))


@both
def test_equal_prompts_are_diffusers_bit_for_bit(zero_cond_t):
    stock, ours = transformers(zero_cond_t=zero_cond_t)
    expected, found = outcome(by_diffusers, stock, [9] * 4), outcome(by_rows, ours, [9] * 4)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_attention_has_no_mask_and_is_called_for_each_row():
    stock, ours = transformers()
    with Attention() as seen:
        outcome(by_rows, ours)
    assert seen.calls == {"plain": 3 * len(LENGTHS)}
    with Attention() as seen:
        outcome(masked, stock)
    assert seen.calls == {"masked": 3}, "else it is not what reaches SDPA that is counted"


def test_padding_gets_nothing_from_attention():
    _, ours = transformers()
    given = []
    for block in ours.transformer_blocks:
        block.attn.to_add_out.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    outcome(by_rows, ours)
    assert len(given) == 3
    for states in given:
        read = [row.any(dim=1).tolist() for row in states]
        assert read == [[True] * n + [False] * (max(LENGTHS) - n) for n in LENGTHS]


def test_compiled_blocks_have_as_many_graphs_for_any_lengths():
    _, ours = transformers(num_layers=1)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(ours, backend="eager")
    graphs = []
    for lengths in ((9, 5), (4, 12), (3, 7), (11, 2), (8, 6)):
        batch = batch_of(lengths)
        with torch.no_grad(), Attention() as seen:
            by_rows(ours, batch, torch.tensor([0.2, 0.7]))
        assert seen.calls == {"plain": 2}
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch.compiler.reset()
    assert 0 < graphs[0] < graphs[1] == graphs[-1]  # for the first shape, and then for any
