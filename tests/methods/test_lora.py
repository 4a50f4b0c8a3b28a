"""LoRA weights by name: the same as weights merged by hand and as diffusers' own, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import methods_inside
import numpy as np
import pytest
import torch
import twins
from safetensors.torch import save_file

from evalbench import registry
from evalbench.errors import Unsupported, UserError

RANK = 3
LAYERS = {
    "dit": ("transformer", ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_out.0"]),
    "sd3": ("transformer", ["transformer_blocks.0.attn.to_k", "transformer_blocks.1.ff.net.0.proj"]),
    "sd": ("unet", ["mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", "down_blocks.0.resnets.0.conv1"]),
}
Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer -> (down, up)


def network(kind: str) -> torch.nn.Module:
    return twins.setup(kind, "").door.network  # the one that `draw` samples from


def matrices(kind: str, layers: list[str] | None = None) -> Matrices:
    """Random low-rank matrices in the shapes that peft gives them."""
    rng = np.random.Generator(np.random.Philox(key=5))
    found = {}
    for name in layers or LAYERS[kind][1]:
        out, *rest = network(kind).get_submodule(name).weight.shape  # type: ignore[union-attr]
        down = torch.from_numpy(rng.normal(size=(RANK, *rest))).float()
        up = torch.from_numpy(rng.normal(size=(out, RANK, *(1 for _ in rest[1:])))).float()
        found[name] = (0.3 * down, 0.3 * up)
    return found


def written(folder: Path, content: dict[str, torch.Tensor], facts: dict[str, Any] | None = None) -> Path:
    file = folder / "pytorch_lora_weights.safetensors"
    metadata = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(facts)} if facts else {})
    save_file({key: value.contiguous() for key, value in content.items()}, file, metadata=metadata)
    return file


def peft_layout(kind: str, found: Matrices) -> dict[str, torch.Tensor]:
    prefix = LAYERS[kind][0]
    down = {f"{prefix}.{name}.lora_A.weight": two[0] for name, two in found.items()}
    return down | {f"{prefix}.{name}.lora_B.weight": two[1] for name, two in found.items()}


def merged_by_hand(kind: str, found: Matrices, factor: float) -> dict[str, torch.Tensor]:
    """The weights that a merge changes, by their names in the state."""
    changed = {}
    for name, (down, up) in found.items():
        weight = network(kind).state_dict()[f"{name}.weight"]
        step = torch.einsum("or,r...->o...", up.reshape(-1, len(down)).to(weight.dtype), down.to(weight.dtype))
        changed[f"{name}.weight"] = weight + factor * step
    return changed


def samples_of(kind: str, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Samples of the network with other weights."""
    before = {name: value.clone() for name, value in network(kind).state_dict().items()}
    try:
        network(kind).load_state_dict(before | weights)
        return methods_inside.draw("ddim", 3, kind, 1.5)[0]
    finally:
        network(kind).load_state_dict(before)


def check_merged(file: Path, kind: str, weights: dict[str, torch.Tensor]) -> None:
    (part,) = registry.build_method(f"ddim+lora:{file}").wraps
    found = {f"{name}.weight": layer.weight for name, layer in part.merged(network(kind)).items()}  # type: ignore[attr-defined]
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(found[name].detach(), weight, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(weight, network(kind).state_dict()[name])


@pytest.mark.parametrize("kind", ["dit", "sd", "sd3"])
def test_it_is_the_network_with_merged_weights_and_nothing_is_left_behind(kind: str, tmp_path: Path) -> None:
    found = matrices(kind)
    written(tmp_path, peft_layout(kind, found))
    before = {name: value.clone() for name, value in network(kind).state_dict().items()}
    plain, cost = methods_inside.draw("ddim", 3, kind, 1.5)
    x, ledger = methods_inside.draw(f'ddim+lora:"{tmp_path}"(scale=0.5)', 3, kind, 1.5)
    torch.testing.assert_close(x, samples_of(kind, merged_by_hand(kind, found, 0.5)), rtol=1e-5, atol=1e-5)
    assert (x - plain).abs().mean() > 1e-3
    assert ledger.cost.tolist() == cost.cost.tolist()
    after = network(kind).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(methods_inside.draw("ddim", 3, kind, 1.5)[0], plain)


def _older(name: str) -> str:
    owner, _, layer = name.removesuffix(".0").rpartition(".")
    return f"{owner}.processor.{layer}_lora"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (lambda name: f"unet.{name}.lora", ("down", "up")),
        (lambda name: f"{name}", ("lora_A.default", "lora_B.default")),
        (lambda name: f"unet.{_older(name)}", ("down", "up")),
    ],
)
def test_layouts_that_diffusers_has_written(names: Any, words: tuple[str, str], tmp_path: Path) -> None:
    found = matrices("sd", LAYERS["sd"][1][:1])
    ((name, two),) = found.items()
    file = written(tmp_path, {f"{names(name)}.{word}.weight": m for word, m in zip(words, two, strict=True)})
    check_merged(file, "sd", merged_by_hand("sd", found, 1.0))


@pytest.mark.parametrize(
    ("facts", "alphas", "factor"),
    [
        ({"transformer.lora_alpha": 6, "transformer.r": RANK}, {}, 6 / RANK),
        ({"transformer.lora_alpha": 6, "transformer.use_rslora": True}, {}, 6 / RANK**0.5),
        ({"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"attn1.to_(q|out.0)": 6}}, {}, 6 / RANK),
        (None, dict.fromkeys(LAYERS["dit"][1], 1.5), 1.5 / RANK),
    ],
)
def test_alpha_is_that_of_the_header_or_of_the_keys(
    facts: dict[str, Any] | None, alphas: dict[str, float], factor: float, tmp_path: Path
) -> None:
    found = matrices("dit")
    keys = {f"transformer.{name}.alpha": torch.tensor(alpha) for name, alpha in alphas.items()}
    file = written(tmp_path, peft_layout("dit", found) | keys, facts)
    check_merged(file, "dit", merged_by_hand("dit", found, factor))


def test_it_is_what_diffusers_itself_loads(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="diffusers loads LoRA weights through peft")
    import copy

    for kind in ("sd", "sd3"):  # its DiT takes none
        facts = {"lora_alpha": 6, "r": RANK, "target_modules": LAYERS[kind][1]}
        prefixed = {f"{LAYERS[kind][0]}.{key}": value for key, value in facts.items()}
        file = written(tmp_path, peft_layout(kind, matrices(kind)), prefixed)
        theirs = copy.deepcopy(network(kind))
        theirs.load_lora_adapter(str(file), prefix=LAYERS[kind][0], weight_name=file.name)  # type: ignore[operator]
        theirs.fuse_lora(lora_scale=0.7)  # type: ignore[operator]
        (part,) = registry.build_method(f"ddim+lora:{file}(scale=0.7)").wraps
        for name, layer in part.merged(network(kind)).items():  # type: ignore[attr-defined]
            fused = theirs.get_submodule(name).get_base_layer().weight  # type: ignore[operator]
            torch.testing.assert_close(layer.weight, fused, rtol=1e-5, atol=1e-6)


def test_networks_whose_blocks_are_not_known_take_them_too(tmp_path: Path) -> None:
    import diffusers

    from evalbench.models.blocks import blocks_of, depth_of

    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "sample_size": 8}
    kinds = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    net = diffusers.UNet2DModel(**sizes, **kinds).eval().requires_grad_(False)  # type: ignore[arg-type]
    blocks, x = blocks_of(net), torch.ones(1, 3, 8, 8)
    matrices_of_it = {"mid_block.resnets.0.conv1": (torch.ones(RANK, 8, 3, 3), torch.ones(8, RANK, 1, 1))}
    (part,) = registry.build_method(f"ddim+lora:{written(tmp_path, peft_layout('sd', matrices_of_it))}").wraps
    plain = net(x, 3).sample
    with blocks.swap(part.merged(net))():  # type: ignore[attr-defined]
        assert not torch.equal(net(x, 3).sample, plain)
    assert torch.equal(net(x, 3).sample, plain)
    assert (blocks.names, depth_of({"_class_name": "UNet2DModel"})) == ((), 0)
    with pytest.raises(Unsupported, match="needs split"):
        blocks.split()


def test_it_composes_with_solvers_modifiers_and_caches(tmp_path: Path) -> None:
    written(tmp_path, peft_layout("dit", matrices("dit")))
    lora = f'lora:"{tmp_path}"(scale=0.5)'
    plain = methods_inside.draw(f"dpm-solver++(order=2)+{lora}", 6)[0]
    cached = methods_inside.draw(f"dpm-solver++(order=2)+{lora}+interval-cache", 6)
    assert bool(torch.isfinite(plain).all())
    assert not torch.equal(plain, cached[0])
    assert bool((cached[1].cost < 6).all())


def test_the_name_holds_the_digest_and_the_cell_knows_the_file_wherever_it_lies(tmp_path: Path) -> None:
    content = peft_layout("dit", matrices("dit"))
    there = tmp_path / "a (copy), v1.5+ema"
    there.mkdir()
    one, two = (registry.build_method(f'ddim+lora:"{written(at, content)}"') for at in (tmp_path, there))
    assert one.text != two.text
    assert one.settings() == two.settings()
    assert registry.build_method(two.text).text == two.text
    assert registry.parse_methods(f"{two.text},unipc") == [two.text, "unipc"]
    (there / "pytorch_lora_weights.safetensors").unlink()
    assert registry.build_method(two.text).settings() == two.settings()  # reports are read where the file is not
    content["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"] += 1
    three = registry.build_method(f"ddim+lora:{written(tmp_path, content)}")
    assert three.settings() != one.settings()
    with pytest.raises(UserError, match="has changed: its SHA-256 is"):
        registry.build_method(one.text).parts[1].check(4, 0)


def test_a_digest_that_looks_like_a_number_is_still_a_text() -> None:
    text = 'ddim+lora:x.safetensors(sha256="12e4567890123456")'
    assert registry.build_method(text).text == text


@pytest.mark.parametrize("header", ["{", "[]"])
def test_a_header_that_is_no_json_object_is_one_line(header: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(peft_layout("dit", matrices("dit")), file, metadata={"lora_adapter_metadata": header})
    with pytest.raises(UserError, match="no JSON object"):
        registry.build_method(f"ddim+lora:{file}").parts[1].check(4, 0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text_encoder.q_proj.lora_linear_layer.up.weight": torch.zeros(4, 3)}, "adapts a text encoder"),
        ({"transformer.transformer_blocks.0.attn1.to_q.lora_magnitude_vector": torch.zeros(4)}, "unknown key"),
        ({"transformer.transformer_blocks.0.attn1.to_q.alpha": torch.zeros(2)}, "unknown key"),
        ({"transformer.transformer_blocks.0.attn1.to_v.lora_A.weight": torch.zeros(3, 4)}, "has no partner"),
        ({"transformer.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.zeros(16, 4)}, "does not go with"),
    ],
)
def test_keys_that_are_not_understood_are_one_line(
    changes: dict[str, torch.Tensor], reason: str, tmp_path: Path
) -> None:
    file = written(tmp_path, peft_layout("dit", matrices("dit")) | changes)
    with pytest.raises(UserError, match=reason) as raised:
        registry.build_method(f"ddim+lora:{file}").parts[1].check(4, 0)
    assert next(iter(changes)) in str(raised.value) or "has no partner" in reason
    assert "\n" not in str(raised.value)


def test_weights_of_another_network_are_a_row_that_says_so(tmp_path: Path) -> None:
    file = written(tmp_path, peft_layout("sd", matrices("sd")))
    with pytest.raises(Unsupported, match=r"made for another network: .* DiTTransformer2DModel has no such layer"):
        methods_inside.draw(f"ddim+lora:{file}", 1, "dit")
    narrow = {LAYERS["dit"][1][0]: (torch.zeros(3, 5), torch.zeros(5, 3))}
    file = written(tmp_path, peft_layout("dit", narrow))
    with pytest.raises(Unsupported, match=r"made for another network: .* has \(16, 16\) there"):
        methods_inside.draw(f"ddim+lora:{file}", 1, "dit")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ddim+lora:nowhere.safetensors", "no such file or folder"),
        ("ddim+lora:{folder}", "holds 0 .safetensors files"),
        ("ddim+lora:{folder}/pickle.bin", "cannot read pickle.bin as safetensors"),
        ("ddim+lora:{folder}/pickle.bin(scale=inf)", "scale must be a number"),
        ("ddim+lora:{folder}/pickle.bin+quant:torchao", "replace layers of one network; leave one out"),
        ('ddim+lora:"x.safetensors', "cannot read|unbalanced quotes"),
    ],
)
def test_files_that_cannot_be_used_are_one_line(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x04]q\x00.")
    with pytest.raises(UserError, match=reason) as raised:
        registry.build_method(text.format(folder=tmp_path)).parts[1].check(4, 0)
    assert "\n" not in str(raised.value)
