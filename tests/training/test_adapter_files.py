"""Adapters in files of their own: numbers that are none, other base weights, running statistics."""

import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hpclr import SARA, load_adapter, save_adapter
from hpclr.errors import UsageError
from hpclr.lowrank.adapters import adapted_weights, merged_state_dict
from hpclr.lowrank.factors import LowRankWarning
from hpclr.parallel import Replica
from hpclr.training.fingerprints import fingerprints


def fresh(seed: int = 0) -> nn.Sequential:
    """A pretrained model, say, with a normalisation layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 7), nn.Linear(7, 3))


@pytest.fixture
def saved(tmp_path):
    """A model whose adapters, head and running statistics have been trained, and its file."""
    model = fresh()
    SARA(model, proportion=0.5)
    with torch.no_grad():
        model(5 + torch.randn(16, 6))
        for parameter in (model[0].sara_b, model[2].sara_b, model[3].weight):
            parameter.normal_()
    save_adapter(model, tmp_path / "a.safetensors")
    return model.eval(), tmp_path / "a.safetensors"


def rewritten(file, change):
    """The file with other entries, and the same facts."""
    with safe_open(file, "pt") as opened:
        facts = opened.metadata()
    entries = load_file(file)
    change(entries)
    save_file(entries, file, facts)
    file.with_name(file.name + ".sha256").unlink()
    return file


def refused(model, file, match):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=match):
        load_adapter(model, file)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("suffix", ["safetensors", "h5"])
def test_running_statistics_are_in_the_file(saved, suffix):
    model, file = saved
    save_adapter(model, file.with_suffix(f".{suffix}"))
    other = fresh().eval()
    x = torch.randn(4, 6)
    assert not torch.allclose(other(x), model(x))
    load_adapter(other, file.with_suffix(f".{suffix}"))
    assert torch.equal(other(x), model(x))
    assert other[1].num_batches_tracked == 1
    assert not other[1].weight.requires_grad


@pytest.mark.parametrize("suffix", ["safetensors", "h5"])
def test_a_flipped_bit_is_noticed(saved, suffix):
    model, file = saved
    file = file.with_suffix(f".{suffix}")
    save_adapter(model, file)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    refused(fresh(), file, "the content has changed since it was saved")


@pytest.mark.parametrize("name", ["2.sara_a", "3.weight", "1.running_var"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.fill_(float("nan")), "numbers of '{}' are not finite as float32"),
        (lambda v: v.int(), "'{}' is int32, in the model float32"),
        (lambda v: v.cfloat(), "'{}' is complex64, in the model float32"),
    ],
)
def test_what_is_no_real_finite_number(saved, name, change, said):
    _, file = saved
    file = rewritten(file, lambda entries: entries.update({name: change(entries[name])}))
    refused(fresh(), file, said.format(name))


def test_numbers_beyond_the_type_of_the_model(saved):
    _, file = saved
    file = rewritten(file, lambda entries: entries["0.sara_a"].fill_(1e6))
    refused(fresh().half(), file, "numbers of '0.sara_a' are not finite as float16")


def test_a_head_that_does_not_fit_hides_nothing(saved):
    _, file = saved
    rewritten(file, lambda entries: entries.update({"2.sara_b": torch.zeros(2, 2)}))
    other = fresh()
    other[3] = nn.Linear(7, 4)
    refused(other, file, r"layer '2' has a weight of 7×8.*'3\.bias' has shape.*'3\.weight' has shape .*in the file$")


def test_other_base_weights_of_the_same_shapes(saved):
    model, file = saved
    other = fresh(seed=1)
    refused(other, file, r"2 of its weights under adapters \(such as '0.weight'\) have other numbers")
    with pytest.warns(LowRankWarning, match="have other numbers"):
        load_adapter(other, file, any_base=True)
    assert torch.equal(other[0].sara_b, model[0].sara_b)
    nearly = fresh()
    nearly[2].weight.data[0, 0] *= 1 + 2**-23
    refused(nearly, file, r"1 of its weights under adapters \(such as '2.weight'\)")


@pytest.mark.parametrize("trained_as", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded_as", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_base_of_another_type_is_remarked_on(trained_as, loaded_as, tmp_path):
    """Converted from one to the other, or both from what was published."""
    model = fresh().to(trained_as)
    SARA(model, proportion=0.5)
    save_adapter(model, tmp_path / "a.h5")
    others = [fresh().to(trained_as).to(loaded_as), fresh().to(loaded_as)]
    for other in others[:1] if {trained_as, loaded_as} == {torch.bfloat16, torch.float16} else others:
        with warnings.catch_warnings(record=True, action="always") as caught:
            load_adapter(other, tmp_path / "a.h5")
        said = [str(one.message) for one in caught if issubclass(one.category, LowRankWarning)]
        assert ["of another type" in text for text in said] == [True] * (trained_as != loaded_as)


def test_merged_or_not_the_base_is_the_same(saved, tmp_path):
    model, _ = saved
    for layer in (model[0], model[2]):
        layer.merge()
    save_adapter(model, tmp_path / "b.safetensors")
    with warnings.catch_warnings(action="error"):
        load_adapter(model, tmp_path / "b.safetensors")
        load_adapter(fresh(), tmp_path / "b.safetensors")


def test_a_file_that_says_nothing_of_its_base(saved):
    _, file = saved
    file.with_name(file.name + ".sha256").unlink()
    save_file(load_file(file), file)
    with pytest.warns(LowRankWarning, match="does not say under which weights"):
        load_adapter(fresh(), file)
    save_file(load_file(file), file, {"base": "{]"})
    refused(fresh(), file, "what it says of its base weights is malformed")


def test_files_of_lora_are_for_peft(tmp_path):
    save_file({"0.lora_A.default.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    refused(fresh(), tmp_path / "a.safetensors", "its adapters are LoRA's, which PEFT reads")


def test_fingerprints_do_not_depend_on_layout():
    weight = torch.randn(4, 6)
    assert fingerprints({"a": weight.mT.contiguous().mT}) == fingerprints({"a": weight})


def test_a_merge_beyond_float16_is_refused():
    model = fresh().half()
    method = SARA(model, proportion=0.5)
    with torch.no_grad():
        for name in ("sara_a", "sara_b", "sara_lambda"):
            model[2].parameter(name).fill_(100)
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match="too large for float16"):
        method.merge()
    assert torch.equal(model[0].weight, before)
    assert not model[0].is_merged
    with pytest.raises(ValueError, match=r"'2\.weight' holds numbers up to .* too large for float16"):
        merged_state_dict(model.state_dict(), adapted_weights(model))


@pytest.mark.parametrize("suffix", ["safetensors", "h5"])
def test_a_normalisation_layer_that_is_used_twice(suffix, tmp_path):
    def twice():
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(6)
        return nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 6), norm, nn.Linear(6, 3))

    model, other, file = twice(), twice(), tmp_path / f"a.{suffix}"
    SARA(model, proportion=0.5)
    model(5 + torch.randn(16, 6))
    save_adapter(model, file)
    load_adapter(other, file)
    assert torch.equal(other[3].running_mean, model[1].running_mean)
    assert other[1].running_mean is other[3].running_mean


@pytest.mark.parametrize("wrapper", [Replica, torch.compile])
def test_names_are_those_inside_a_wrapper(wrapper, tmp_path):
    model, plain, wrapped, file = fresh(), fresh(), wrapper(fresh()), tmp_path / "a.safetensors"
    outside = wrapper(model)
    SARA(outside, proportion=0.5)
    model[0].sara_b.data.normal_()
    save_adapter(outside, file)
    assert "0.sara_a" in load_file(file)
    load_adapter(plain, file)
    load_adapter(wrapped, file)
    inside = getattr(wrapped, "_orig_mod", None) or wrapped.module
    for other in (plain, inside):
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
