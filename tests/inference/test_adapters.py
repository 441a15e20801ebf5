"""Many adapters in one batch: each row as if it were alone with its own."""

import pytest
import torch
import zoo

import fds
from fds import tree
from fds.files import read_tensors, write_tensors
from fds.inference import NONE, adapters, choose, load_adapter


def written(folder, family, rank, alpha, rslora, seed, dora=False):
    """An adapter of random numbers in a PEFT directory; the program that it is of, and its weights."""
    program, params = fds.functionalize(zoo.build(family))
    targets = zoo.FAMILIES[family][1]
    alone = fds.lora(rank=rank, targets=targets, alpha=alpha, rslora=rslora, dora=dora)(program)
    stored, g = alone.place(params), torch.Generator().manual_seed(seed)
    stored = {s: {k: torch.randn(v.shape, generator=g) * 0.2 + (v if "magnitude" in k else 0) if "lora_" in k else v for k, v in part.items()} for s, part in stored.items()}  # fmt: skip
    fds.save_adapters(folder, alone, stored)
    return alone, stored


@pytest.fixture(params=["llama", "gpt2"])
def served(request, tmp_path):
    """Two adapters of different ranks, scales and kinds in one program."""
    made = [
        written(tmp_path / str(i), request.param, *rest)
        for i, rest in enumerate([(2, 4.0, False, 1), (3, 3.0, True, 2, True)])
    ]
    program, params = fds.functionalize(zoo.build(request.param))
    serve = adapters(3, rank=4, targets=zoo.FAMILIES[request.param][1], rows=6)(program)
    stored = serve.place(params)
    for slot in (0, 1):
        stored = load_adapter(serve, stored, slot, tmp_path / str(slot))
    return serve, stored, [*made, (program, program.place(params))], params


def test_each_row_has_its_own(served):
    serve, stored, alone, params = served
    ids = zoo.batch("llama")["input_ids"]
    index = [1, 0, NONE, 1]
    chosen = choose(serve, stored, index)
    got = serve(chosen, input_ids=ids).logits
    for row, i in enumerate(index):
        program, own = alone[i]
        torch.testing.assert_close(got[row], program(own, input_ids=ids[row : row + 1]).logits[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got[0], alone[NONE][0](alone[NONE][1], input_ids=ids[:1]).logits[0], atol=1e-3)
    back = serve.restore(chosen)
    assert all(torch.equal(back[k], v) for k, v in params.items())
    torch.testing.assert_close(serve(stored, input_ids=ids).logits, alone[NONE][0](alone[NONE][1], input_ids=ids).logits)  # fmt: skip


@pytest.mark.parametrize("compile", [False, True])
def test_text(served, compile):
    serve, stored, alone, _ = served
    if compile and serve.origin.core.config.model_type != "llama":
        pytest.skip("one family is enough for the compiler")
    ids = zoo.batch("llama")["input_ids"]
    for index in ([1, 0, NONE, 1], [0, 0, 1, NONE]):  # the second choice is other data for the same graph
        got = fds.generate(serve, choose(serve, stored, index), ids, max_new_tokens=8, compile=compile)
        for row, i in enumerate(index):
            program, own = alone[i]
            want = fds.generate(program, own, ids[row : row + 1], max_new_tokens=8, compile=False)
            assert torch.equal(got[row], want[0]), (index, row)


def test_what_cannot_be_is_refused(served, tmp_path):
    serve, stored, alone, _ = served
    before = [x.clone() for x in tree.leaves(stored)]
    for index, words in (([3], "0 to 2"), ([-2], "-1 for none"), ([0] * 7, "rows="), ([0.6], "whole numbers"), ([[0]], "whole numbers"), (torch.tensor([0.6]), "whole numbers")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            choose(serve, stored, index)
    with pytest.raises(ValueError, match="slot 3"):
        load_adapter(serve, stored, 3, tmp_path / "0")
    with pytest.raises(ValueError, match="no transformation 'adapters'"):
        choose(alone[NONE][0], alone[NONE][1], [0])
    with pytest.raises(ValueError, match="repeat the prompts"):
        fds.generate(serve, stored, zoo.batch("llama")["input_ids"], max_new_tokens=2, n=2, temperature=1.0)
    with pytest.raises(ValueError, match="at most 6 rows"):
        serve(stored, input_ids=zoo.batch("llama", 8)["input_ids"])
    with pytest.raises(ValueError, match="count=0"):
        adapters(0, rank=2, targets="*")
    with pytest.raises(ValueError, match=r"adapters: targets="):
        adapters(1, rank=2, targets=[])
    with pytest.raises(ValueError, match=r"slot 0\.5"):
        load_adapter(serve, stored, 0.5, tmp_path / "0")
    split = fds.shard(fds.sharding.mesh(dp=-1)["dp"])(serve)
    for act in (lambda s: choose(split, s, [0]), lambda s: load_adapter(split, s, 0, tmp_path / "0")):
        with pytest.raises(ValueError, match=r"shard.*another form"):
            act(split.place(serve.restore(stored)))
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves(stored), strict=True))


def test_files_that_do_not_fit(tmp_path):
    written(tmp_path, "llama", 4, 4.0, False, 1)
    program, params = fds.functionalize(zoo.build("llama"))
    small = adapters(1, rank=2, targets="*.q_proj")(program)
    with pytest.raises(ValueError, match="r is 4"):
        load_adapter(small, small.place(params), 0, tmp_path)
    other = adapters(1, rank=4, targets="*.v_proj")(program)
    with pytest.raises(ValueError, match="targets="):
        load_adapter(other, other.place(params), 0, tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    whole = adapters(1, rank=4, targets="*.q_proj")(program)
    with pytest.raises(ValueError, match="magnitude_vector' is missing"):
        load_adapter(whole, whole.place(params), 0, tmp_path)
    config.write_text(config.read_text().replace('"use_dora": true', '"rank_pattern": {"a": 1}'))
    with pytest.raises(ValueError, match="rank_pattern"):
        load_adapter(whole, whole.place(params), 0, tmp_path)
    config.write_text(config.read_text().replace('"rank_pattern": {"a": 1}', '"use_dora": false'))
    plain = config.read_text()
    for old, new, words in (
        ('"r": 4', '"r": 3', r"\(4, 32\), required \(3, 32\)"), ('"r": 4', '"q": 4', "r=None"), ('"LORA"', '"LOHA"', "peft_type='LOHA'"), ('"none"', '"all"', "bias='all'"),
        ('"lora_alpha": 4.0', '"lora_alpha": "4"', "lora_alpha='4'"),
    ):  # fmt: skip
        assert old in plain
        config.write_text(plain.replace(old, new))
        with pytest.raises(ValueError, match=words):
            load_adapter(whole, whole.place(params), 0, tmp_path)
    config.write_text(plain)
    path = tmp_path / "adapter_model.safetensors"
    found = read_tensors(path)
    found = {k: v.clone() for k, v in found.items()}
    for changed, words in (
        ({k: v[:, :8] if "lora_A" in k else v for k, v in found.items()}, "trained on this model"), ({k: v[:8] if "lora_B" in k else v for k, v in found.items()}, "trained on this model"), ({}, "no tensors"),
    ):  # fmt: skip
        write_tensors(path, changed)
        with pytest.raises(ValueError, match=words):
            load_adapter(whole, whole.place(params), 0, tmp_path)
    with pytest.raises(ValueError, match="not split over ranks"):
        fds.tensor_parallel(fds.sharding.Axis("tp", 1, 0))(whole)
