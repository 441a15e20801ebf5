"""The engine against a plain loop of torch: the same losses over several steps, whatever the configuration says about where things are."""

import copy
import json
import re

import pytest
import ranks
import torch
import zoo

import fds.deepspeed
from fds.deepspeed.front import EngineOptimizer

STEPS, ROWS = 4, 8
ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1}}
ZERO = "zero_optimization"


def config(**changes):
    return {"train_batch_size": ROWS, "gradient_clipping": 1.0, "optimizer": copy.deepcopy(ADAMW), **changes}


def offload(**parts):
    return {ZERO: {"stage": 3, **{f"offload_{k}": {"device": v} for k, v in parts.items()}}}


CASES = {
    "stage 0": {ZERO: {"stage": 0}},
    "stage 1": {ZERO: {"stage": 1}},
    "stage 2, accumulation": {ZERO: {"stage": 2}, "gradient_accumulation_steps": 2},
    "stage 3, accumulation": {ZERO: {"stage": 3}, "gradient_accumulation_steps": 2},
    "stage 0, accumulation": {"gradient_accumulation_steps": 4},
    "small leaves whole": {ZERO: {"stage": 3, "stage3_param_persistence_threshold": 100}},
    "gathered again": {ZERO: {"stage": 3, "stage3_max_live_parameters": 0}},
    "optimizer in memory": {ZERO: {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "all in memory": offload(param="cpu", optimizer="cpu"),
    "all in files": offload(param="nvme", optimizer="nvme"),
    "recomputed": {ZERO: {"stage": 3}, "activation_checkpointing": {}},
    "activations in memory": {ZERO: {"stage": 3}, "activation_checkpointing": {"cpu_checkpointing": True}},
    "bf16, stage 0": {"bf16": {"enabled": True}},
    "bf16, stage 1": {"bf16": {"enabled": True}, ZERO: {"stage": 1}},
    "bf16, stage 2, wide gradients": {"bf16": {"enabled": True}, ZERO: {"stage": 2}, "data_types": {"grad_accum_dtype": "fp32"}, "gradient_accumulation_steps": 2},
    "bf16, stage 3": {"bf16": {"enabled": True}, ZERO: {"stage": 3}},
    "bf16, float32 on the wire": {"bf16": {"enabled": True}, ZERO: {"stage": 3}, "communication_data_type": "fp32"},
    "fp16, stage 2": {"fp16": {"enabled": True, "initial_scale_power": 8}, ZERO: {"stage": 2}},
}  # fmt: skip


def rows(step, rank=0, world=1, micro=None, of=1):
    """This rank's rows of a step, or of a microbatch of it. Ranks have blocks of rows, microbatches blocks of those."""
    ids = zoo.batch("llama", ROWS, seed=step)["input_ids"].chunk(world)[rank]
    return ids if micro is None else ids.chunk(of)[micro]


def reference(frozen=(), groups=None, schedule=None, steps=STEPS, clip=1.0, lr=1e-2):
    """Losses and final weights of the plain module."""
    model = zoo.build("llama", training=True)
    for k, p in model.named_parameters():
        p.requires_grad_(not any(f in k for f in frozen))
    tx = torch.optim.AdamW(groups(model) if groups else model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = schedule(tx) if schedule else None
    losses = []
    for i in range(steps):
        loss = model(input_ids=rows(i), labels=rows(i)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in tx.param_groups for p in g["params"]], clip)
        tx.step()
        tx.zero_grad()
        if scheduler:
            scheduler.step()
        losses.append(float(loss))
    return losses, dict(model.named_parameters())


def place():
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def drive(engine, steps=STEPS, start=0):
    """DeepSpeed's loop: the mean losses of the steps, over all ranks."""
    rank, world = place()
    gas, losses = engine.gradient_accumulation_steps(), []
    for i in range(start, start + steps):
        for m in range(gas):
            ids = rows(i, rank, world, m, gas)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            assert engine.is_gradient_accumulation_boundary() == (m == gas - 1)
            engine.step()
            assert engine.was_step_applied() == (m == gas - 1)
        losses.append(float(engine.metrics["loss"]))
    assert engine.global_steps == start + steps and engine.skipped_steps == 0
    return losses


def made(given, folder=None, *, groups=None, schedule=None, frozen=(), checkpointing=False):
    model = zoo.build("llama", training=True)
    for k, p in model.named_parameters():
        p.requires_grad_(not any(f in k for f in frozen))
    if checkpointing:
        model.gradient_checkpointing_enable()
    given = copy.deepcopy(given)
    for part in given.get(ZERO, {}).values():
        if isinstance(part, dict) and part.get("device") == "nvme":
            part["nvme_path"] = folder
    tx = None
    if groups:
        given.pop("optimizer", None)
        tx = torch.optim.AdamW(groups(model), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    engine, front, _, scheduler = fds.deepspeed.initialize(
        model=model, optimizer=tx, lr_scheduler=schedule(tx) if schedule else None, config=given
    )
    return engine, front, scheduler, model


def case(name, folder):
    engine, *_ = made(config(**CASES[name]), str(folder))
    return drive(engine), engine.module_state_dict(), engine.get_global_grad_norm()


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_follow_one_process(name, tmp_path):
    low = "bf16" in CASES[name] or "fp16" in CASES[name]
    want, weights = reference()
    (got, state, _), (again, nothing, _) = ranks.run(2, case, name, tmp_path)
    assert got == again and not nothing
    assert got == pytest.approx(want, abs=2e-2 if low else 2e-5)
    for k, x in state.items():
        far = (x.float() - weights[k]).abs()
        assert far.mean() < 4e-3 if low else far.max() < 2e-5, k  # Adam makes a whole step of a gradient's wrong sign


# --- groups, frozen leaves, schedulers: the client's own ---


def by_decay(model):
    plain = [p for k, p in model.named_parameters() if "norm" in k and p.requires_grad]
    rest = [p for k, p in model.named_parameters() if "norm" not in k and p.requires_grad]
    return [{"params": rest}, {"params": plain, "weight_decay": 0.0, "lr": 3e-2}]


def falling(tx):
    return torch.optim.lr_scheduler.LambdaLR(tx, [lambda i: 1.0 / (1 + i), lambda i: 0.5**i])


FROZEN = ("embed_tokens", "layers.0.mlp")


def client(stage, folder, away=None):
    zero = {"stage": stage, **({"offload_optimizer": {"device": away}, "offload_param": {"device": away}} if away else {})}  # fmt: skip
    engine, front, scheduler, _model = made(
        config(**{ZERO: zero}), folder, groups=by_decay, schedule=falling, frozen=FROZEN
    )
    losses = drive(engine)
    return losses, engine.module_state_dict(), engine.get_lr(), scheduler.get_last_lr(), [g["lr"] for g in front.param_groups]  # fmt: skip


@pytest.mark.parametrize("stage, away", [(0, None), (2, None), (3, None), (3, "cpu")])
def test_a_client_optimizer_with_groups_a_scheduler_and_frozen_leaves(stage, away, tmp_path):
    want, weights = reference(FROZEN, by_decay, falling)
    for losses, state, *rates in ranks.run(2, client, stage, str(tmp_path), away):
        assert losses == pytest.approx(want, abs=2e-5)
        assert rates == [[pytest.approx(1e-2 / 5), pytest.approx(3e-2 / 16)]] * 3
        for k, x in state.items():
            torch.testing.assert_close(x, weights[k], rtol=0, atol=2e-5)


def test_a_leaf_in_no_group_is_frozen():
    only = lambda model: [p for k, p in model.named_parameters() if "layers.1" in k]  # noqa: E731
    want, _weights = reference(groups=only)
    engine, *_ = made(config(), groups=only)
    assert 'fds.at("lm_head.weight", fds.freeze())' in engine.recipe.source()
    assert drive(engine) == pytest.approx(want, abs=2e-5)
    start = zoo.build("llama")
    assert torch.equal(engine.module.lm_head.weight, start.lm_head.weight)


def test_a_changed_learning_rate_counts():
    engine, front, *_ = made(config())
    start = {k: v.clone() for k, v in engine.module.named_parameters()}
    front.param_groups[0]["lr"] = 0.0
    drive(engine, 1)
    assert all(torch.equal(v, start[k]) for k, v in engine.module.named_parameters())
    front.param_groups[0]["lr"] = 1e-2
    drive(engine, 1, start=1)
    assert not torch.equal(engine.module.lm_head.weight, start["lm_head.weight"])


def test_gradient_checkpointing_of_the_model_becomes_recompute():
    engine, *_, model = made(config(), checkpointing=True)
    assert [t.name for t in engine.program.history] == ["replicate", "checkpoint"]
    assert model.model.gradient_checkpointing
    assert drive(engine) == pytest.approx(reference()[0], abs=2e-5)


# --- the same thing by other ways ---


def dropping():
    """GPT-2 has dropout everywhere: masks have to be the same ones."""
    model = zoo.build("gpt2", training=True)
    return model


def test_imperative_is_train_batch_and_the_printed_program():
    """Dropout, accumulation, clipping: calls one by one, `train_batch`, and what was printed, run."""
    given = config(gradient_accumulation_steps=2)

    def batches(i):
        ids = rows(i)
        return [{"input_ids": x, "labels": x} for x in ids.chunk(2)]

    one, *_ = fds.deepspeed.initialize(model=dropping(), config=given)
    other, *_ = fds.deepspeed.initialize(model=dropping(), config=given)
    names = {"model": dropping()}
    exec(one.recipe.source(), names)
    state = names["step"].init(names["params"])
    for i in range(3):
        for b in batches(i):
            one.backward(one(**b).loss)
            one.step()
        by_batch = other.train_batch(iter(batches(i)))
        whole = {k: torch.cat([b[k] for b in batches(i)]) for k in ("input_ids", "labels")}
        state, metrics = names["step"](state, whole)
        assert torch.equal(one.metrics["loss"], by_batch)
        assert float(metrics["loss"]) == pytest.approx(float(by_batch), abs=1e-5)  # its update is rounded elsewhere
    for a, b in zip(*(fds.tree.leaves(s.params) for s in (one.state, other.state)), strict=True):
        assert torch.equal(a, b)


def test_train_batch_compiled_follows_the_loop():
    engine, *_ = made(config(gradient_accumulation_steps=2, compile={"deepcompile": True}))
    losses = [float(engine.train_batch(iter([{"input_ids": x, "labels": x} for x in rows(i).chunk(2)]))) for i in range(3)]  # fmt: skip
    assert losses == pytest.approx(reference(steps=3)[0], abs=2e-5)
    assert engine.global_steps == 3 and engine.micro_steps == 6
    evaluated = engine.eval_batch(iter([{"input_ids": x, "labels": x} for x in rows(0).chunk(2)]))
    ids = rows(0)
    with torch.no_grad():
        assert float(engine.module.eval()(input_ids=ids, labels=ids).loss) == pytest.approx(float(evaluated), abs=2e-5)
    with pytest.raises(ValueError, match=r"evaluation mode"):
        engine.train_batch(iter([]))


# --- checkpoints ---


def saved(folder, stage):
    engine, *_ = made(config(**{ZERO: {"stage": stage}}), groups=by_decay, schedule=falling)
    drive(engine, 2)
    engine.save_checkpoint(folder, client_state={"note": [1, "two"]})
    return drive(engine, 2, start=2)


def resumed(folder, stage):
    engine, _front, _scheduler, _ = made(config(**{ZERO: {"stage": stage}}), groups=by_decay, schedule=falling)
    path, client_state = engine.load_checkpoint(folder)
    assert path.endswith("global_step2") and client_state == {"note": [1, "two"]}
    assert engine.global_samples == 2 * ROWS
    return drive(engine, 2, start=2), engine.get_lr()


def test_a_checkpoint_goes_on_at_another_stage_and_number_of_ranks(tmp_path):
    want, _ = reference(groups=by_decay, schedule=falling)
    assert ranks.run(2, saved, str(tmp_path), 3)[0] == pytest.approx(want[2:], abs=2e-5)
    assert (tmp_path / "latest").read_text() == "global_step2"
    assert resumed(str(tmp_path), 0)[0] == pytest.approx(want[2:], abs=2e-5)
    for losses, rates in ranks.run(2, resumed, str(tmp_path), 1):
        assert losses == pytest.approx(want[2:], abs=2e-5)
        assert rates == [pytest.approx(1e-2 / 5), pytest.approx(3e-2 / 16)]


def test_no_checkpoint_is_none_and_a_wrong_tag_an_error(tmp_path):
    engine, *_ = made(config())
    assert engine.load_checkpoint(tmp_path) == (None, None)
    drive(engine, 1)
    engine.save_checkpoint(tmp_path, tag="best", save_latest=False)
    assert engine.load_checkpoint(tmp_path) == (None, None)
    assert engine.load_checkpoint(tmp_path, tag="best")[0] is not None
    with pytest.raises(ValueError, match=r"no checkpoint 'bets'; did you mean 'best'"):
        engine.load_checkpoint(tmp_path, tag="bets")
    engine.load_checkpoint(tmp_path, tag="best", load_module_only=True)
    assert int(engine.state.step) == 0


def sixteen(folder):
    engine, *_ = made(config(bf16={"enabled": True}, **{ZERO: {"stage": 3}}), frozen=FROZEN)
    drive(engine, 1)
    assert engine.save_16bit_model(folder) and engine.save_16bit_model(folder, "trained.safetensors", True)
    return engine.module.lm_head.weight.is_meta


def test_save_16bit_model_gathers(tmp_path):
    from safetensors.torch import load_file

    assert ranks.run(2, sixteen, str(tmp_path)) == [True, True]
    state = torch.load(tmp_path / "pytorch_model.bin")
    zoo.build("llama").to(torch.bfloat16).load_state_dict(state)
    assert {x.dtype for x in state.values()} == {torch.bfloat16}
    trained = load_file(tmp_path / "trained.safetensors")
    assert trained.keys() == {k for k in state if not any(f in k for f in FROZEN)}


# --- fp16 ---


def test_fp16_skips_lowers_the_scale_and_goes_on(caplog):
    caplog.set_level("INFO", "fds.deepspeed")
    engine, _, _scheduler, _ = made(config(fp16={"enabled": True, "initial_scale_power": 32, "hysteresis": 1}, scheduler={"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}}))  # fmt: skip
    ids = rows(0)
    seen = []
    for _ in range(24):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        seen.append((engine.was_step_applied(), engine.loss_scale(), engine.get_lr()[0]))
        if engine.was_step_applied():
            break
    assert seen[0] == (False, 2.0**31, 1e-2) and seen[-1][0]
    assert engine.skipped_steps == len(seen) - 1 == int(engine.state.skipped)
    assert engine.get_lr() == [5e-3]  # the scheduler made one step, for the one that was applied
    line = next(x for x in caplog.messages if "step 1 was skipped" in x)
    assert re.search(r"not finite: (\S+, ){2}\S+ and \d+ more, loss scale 4\.29497e\+09", line), line


# --- the module, modes ---


def test_the_module_follows_and_its_modes_count():
    engine, *_, model = made(config())
    ids = rows(0)
    drive(engine, 1)
    assert engine.module is model
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, engine(input_ids=ids).logits)
    model.eval()
    assert not engine.training
    engine.train()
    assert model.training and engine.training
    del model
    import gc

    gc.collect()
    with torch.no_grad():  # the client's is gone: another one is made
        torch.testing.assert_close(engine.module(input_ids=ids).logits, engine(input_ids=ids).logits)
    assert engine.module is engine.module


def test_dropout_is_off_in_eval():
    engine, *_ = fds.deepspeed.initialize(model=dropping(), config=config())
    ids = rows(0)
    same = lambda: torch.equal(engine(input_ids=ids).logits, engine(input_ids=ids).logits)  # noqa: E731
    assert not same()
    engine.eval()
    assert same()


def test_any_loss_several_backwards_and_a_boundary_of_ones_own():
    """Two losses of one output, each backward by itself, and the boundary said by hand."""
    want, _ = reference()
    engine, *_ = made(config(train_batch_size=ROWS, gradient_accumulation_steps=2))
    for i in range(STEPS):
        for m, ids in enumerate(rows(i).chunk(2)):
            engine.set_gradient_accumulation_boundary(m == 1)
            out = engine(input_ids=ids, labels=ids)
            engine.backward(0.25 * out.loss, retain_graph=True)
            with engine.no_sync():
                engine.scale(0.75 * out.loss).backward()
        engine.step()
        assert float(engine.metrics["loss"]) == pytest.approx(want[i], abs=2e-5)


# --- errors ---

WRONG = {
    "step first": (lambda e, ids: e.step(), r"no engine\.backward\(loss\)"),
    "backward first": (lambda e, ids: e.backward(torch.ones((), requires_grad=True)), r"no engine\(batch\) since"),
    "not a scalar": (lambda e, ids: e.backward(e(input_ids=ids).logits), r"0-D floating tensor"),
    "detached": (lambda e, ids: e.backward(e(input_ids=ids, labels=ids).loss.detach()), r"has no graph"),
    "another graph": (lambda e, ids: (e(input_ids=ids), e.backward(torch.ones((), requires_grad=True))), r"depends on no parameter"),
    "step in no_sync": (lambda e, ids: in_no_sync(e, lambda: (e.backward(e(input_ids=ids, labels=ids).loss), e.step())), r"inside of no_sync"),
    "no_sync twice": (lambda e, ids: in_no_sync(e, lambda: in_no_sync(e, int)), r"inside of no_sync\(\) already"),
    "train_batch halfway": (lambda e, ids: (e.backward(e(input_ids=ids, labels=ids).loss), e.train_batch(iter([]))), r"middle of an accumulation"),
    "too few": (lambda e, ids: e.train_batch(iter([])), r"ended after 0 of 1"),
    "no loss": (lambda e, ids: e.train_batch(iter([{"input_ids": ids}])), r"give the batch its labels"),
    "no data": (lambda e, ids: e.train_batch(), r"no training_data"),
    "optimizer.step": (lambda e, ids: e.optimizer.step(), r"call engine\.step\(\)"),
    "frozen left out": (lambda e, ids: e.save_checkpoint("nowhere", exclude_frozen_parameters=True), r"exclude_frozen_parameters"),
    "beams": (lambda e, ids: e.generate(ids, max_new_tokens=2, num_beams=4), r"num_beams=4"),
    "no tokens": (lambda e, ids: e.generate(ids, max_length=3), r"at least one new token"),
    "attribute": (lambda e, ids: e.get_input_embeddings, r"engine\.module\.get_input_embeddings"),
}  # fmt: skip


def in_no_sync(engine, f):
    with engine.no_sync():
        return f()


@pytest.fixture(scope="module")
def engine():
    return made(config())[0]


@pytest.mark.parametrize("name", WRONG)
def test_wrong_orders_are_errors(name, engine):
    do, message = WRONG[name]
    engine.zero_grad()
    engine.micro_steps = engine.global_steps
    with pytest.raises((ValueError, AttributeError), match=message):
        do(engine, rows(0))


def stepped(model):
    tx = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(input_ids=rows(0), labels=rows(0)).loss.backward()
    tx.step()
    return tx


def adafactor(model):
    return torch.optim.Adafactor(model.parameters())


REFUSED = {
    "no model": (lambda m: dict(config=config()), r"model is NoneType"),
    "no config": (lambda m: dict(model=m), r"no configuration"),
    "two configs": (lambda m: dict(model=m, config=config(), args=Arguments("x.json")), r"both given"),
    "steps made": (lambda m: dict(model=m, optimizer=stepped(m), config=config()), r"made steps already"),
    "unknown optimizer": (lambda m: dict(model=m, optimizer=adafactor(m), config=config()), r"Adafactor, and fds has no rule like it"),
    "amsgrad": (lambda m: dict(model=m, optimizer=torch.optim.AdamW(m.parameters(), amsgrad=True), config=config()), r"amsgrad"),
    "another model's": (lambda m: dict(model=m, optimizer=torch.optim.AdamW(zoo.build("llama").parameters()), config=config()), r"no parameter of the model"),
    "no optimizer": (lambda m: dict(model=m, optimizer=3, config=config()), r"required one of torch"),
    "scheduler alone": (lambda m: dict(model=m, lr_scheduler=falling(torch.optim.AdamW(by_decay(m))), config=config()), r"on an optimizer that was not given"),
    "not started": (lambda m: dict(model=m, config=config(), dist_init_required=False), r"no process group is running"),
    "sequence parallel": (lambda m: dict(model=m, config=config(), mesh_param=(1, 2)), r"mesh_param=\(1, 2\), required \(1, 1\)"),
    "stage 0 offload": (lambda m: dict(model=m, config=config(**{ZERO: {"stage": 0, "offload_optimizer": {"device": "cpu"}}})), r"offload_optimizer"),
    "meta": (lambda m: dict(model=m.to("meta"), config=config()), r"is on the meta device"),
    "wire": (lambda m: dict(model=m, config=config(communication_data_type="fp16")), r"communication_data_type"),
}  # fmt: skip


class Arguments:
    def __init__(self, path):
        self.deepspeed_config = path


@pytest.mark.parametrize("name", REFUSED)
def test_what_initialize_refuses(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        fds.deepspeed.initialize(**make(zoo.build("llama")))


def test_an_engine_without_an_optimizer_only_computes():
    given = config()
    del given["optimizer"]
    engine, front, loader, scheduler = fds.deepspeed.initialize(model=zoo.build("llama"), config=json.loads(json.dumps(given)))  # fmt: skip
    assert front is None and loader is None and scheduler is None
    ids = rows(0)
    with torch.no_grad():
        torch.testing.assert_close(engine(ids).logits, zoo.build("llama")(ids).logits)
    with pytest.raises(ValueError, match=r"this engine has no optimizer"):
        engine.step()


def test_training_data_is_the_third_result_and_goes_on(tmp_path):
    data = [{"input_ids": x, "labels": x} for x in torch.cat([rows(i) for i in range(3)])]
    engine, front, loader, _ = fds.deepspeed.initialize(model=zoo.build("llama", training=True), config=config(gradient_accumulation_steps=2), training_data=data)  # fmt: skip
    assert isinstance(front, EngineOptimizer) and len(loader) == 6
    engine.train_batch()
    engine.save_checkpoint(tmp_path)
    want = [float(engine.train_batch()) for _ in range(3)]
    again, *_ = fds.deepspeed.initialize(model=zoo.build("llama", training=True), config=config(gradient_accumulation_steps=2), training_data=data)  # fmt: skip
    again.load_checkpoint(tmp_path)
    assert [float(again.train_batch()) for _ in range(3)] == want


def test_what_it_says_and_measures(tmp_path, caplog):
    """Lines, events, a profile, and a curriculum, as the configuration asks for them."""
    course = {"enabled": True, "curriculum_type": "seqlen", "min_difficulty": 4, "max_difficulty": 12, "schedule_type": "fixed_linear", "schedule_config": {"total_curriculum_step": 2, "difficulty_step": 4}}  # fmt: skip
    given = config(
        steps_per_print=1, wall_clock_breakdown=True, memory_breakdown=True, dump_state=True, curriculum_learning=course,
        csv_monitor={"enabled": True, "output_path": str(tmp_path), "job_name": "job"},
        flops_profiler={"enabled": True, "profile_step": 1, "output_file": str(tmp_path / "flops.txt")},
    )  # fmt: skip
    caplog.set_level("INFO", "fds.deepspeed")
    engine, *_ = made(given)
    seen = [engine(input_ids=rows(0), labels=rows(0)).logits.shape[1]]
    drive(engine, 2)
    seen.append(engine(input_ids=rows(0), labels=rows(0)).logits.shape[1])
    engine.eval()
    assert [*seen, engine(input_ids=rows(0)).logits.shape[1]] == [8, 12, 12]
    engine.destroy()
    said = caplog.text
    assert "step=2, skipped=0, lr=[0.01]" in said and said.count("memory now") == 2 and "time (ms) | fwd:" in said
    assert (tmp_path / "job" / "Train_Samples_train_loss.csv").read_text().startswith("step,train_loss\n8,")
    text = (tmp_path / "flops.txt").read_text()
    assert "backward" in text and "LlamaDecoderLayer" in text


@pytest.mark.parametrize("case, stage", [("zero1", 3), ("universal3", 1)])
def test_a_run_of_deepspeeds_goes_on(case, stage, tmp_path):
    import tarfile

    import deepspeed_fixture as theirs

    with tarfile.open(theirs.ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    given = {"train_batch_size": 4, "gradient_clipping": 0, "optimizer": {"type": "AdamW", "params": theirs.ADAM}, ZERO: {"stage": stage}}  # fmt: skip
    engine, *_ = fds.deepspeed.initialize(model=theirs.build().train(), config=given)
    path, state = engine.load_checkpoint(tmp_path / case)
    assert path is not None and state == {} and engine.global_steps == theirs.BEFORE
    losses = []
    for i in range(theirs.BEFORE, theirs.BEFORE + theirs.AFTER):
        ids = theirs.rows(i)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        losses.append(float(engine.metrics["loss"]))
    want = json.loads((tmp_path / {"universal3": "zero3"}.get(case, case) / "losses.json").read_text())
    assert losses == pytest.approx(want[theirs.BEFORE :], rel=1e-5)


def test_generate_is_that_of_the_weights():
    engine, *_ = made(config(hybrid_engine={"enabled": True, "max_out_tokens": 20}))
    drive(engine, 1)
    ids = rows(0)[:2]
    with torch.no_grad():
        want = engine.module.eval().generate(ids, max_new_tokens=4, do_sample=False)
    got = engine.generate(ids, max_length=16, do_sample=False, compile=False)
    assert torch.equal(got, want[:, : got.shape[1]])
    with pytest.raises(ValueError, match=r"max_out_tokens is 20"):
        engine.generate(ids, max_new_tokens=9)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.5, "seed": 3}, {"temperature": 0.5, "seed": 3}),
        ({"do_sample": False, "temperature": 0.5}, {"temperature": 0.0}),
        ({"use_cache": True, "num_beams": 1, "synced_gpus": True}, {}),
    ],
)
def test_generates_options_are_those_of_transformers(given, want, engine):
    class Spy:
        def generate(self, *args, **options):
            return options

    before, engine._hybrid = engine._hybrid, Spy()
    try:
        got = engine.generate(rows(0), max_length=rows(0).shape[1] + 3, **given)
    finally:
        engine._hybrid = before
    drawn = {"seed": got["seed"]} if given.get("do_sample") else {}
    assert got == {"max_new_tokens": 3, "eos_token_id": 2, **drawn, **want}


# --- schedulers: the configuration's ---

LINEAR = {
    "type": "WarmupDecayLR",
    "params": {"total_num_steps": 6, "warmup_num_steps": 2, "warmup_type": "linear", "warmup_max_lr": 1e-2},
}
RATES = [0.0, 0.0, 0.5e-2, 1e-2]  # of the first updates


def of_torch(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


OWN = {"the configuration's": lambda m: None, "torch's": lambda m: of_torch(m.parameters()), "a function": lambda m: of_torch}  # fmt: skip


@pytest.mark.parametrize("own", OWN)
def test_the_configurations_scheduler_moves_every_optimizer(own):
    model = zoo.build("llama", training=True)
    engine, _, _, scheduler = fds.deepspeed.initialize(model=model, optimizer=OWN[own](model), config=config(scheduler=LINEAR))  # fmt: skip
    rates, losses = [], []
    for i in range(STEPS):
        rates += engine.get_lr()
        losses += drive(engine, 1, start=i)
    assert rates == pytest.approx(RATES) and scheduler.state_dict() == {"last_batch_iteration": STEPS - 1}
    want, _ = reference(schedule=lambda t: torch.optim.lr_scheduler.LambdaLR(t, lambda i: RATES[min(i, 3)] / 1e-2))
    assert losses == pytest.approx(want, abs=2e-5)


def test_what_begins_anew_after_loading(tmp_path):
    engine, *_ = made(config(scheduler=LINEAR))
    drive(engine, 3)
    engine.save_checkpoint(tmp_path)
    again, *_ = made(config(scheduler=LINEAR))
    for apart in ({"load_optimizer_states": False}, {"load_lr_scheduler_states": False}):
        with pytest.raises(ValueError, match=r"WarmupDecayLR, is a function of the optimizer's count"):
            again.load_checkpoint(tmp_path, **apart)
    again.load_checkpoint(tmp_path)
    assert again.global_steps == 3 and again.get_lr() == [pytest.approx(RATES[3])]
    for anew in ({"load_optimizer_states": False, "load_lr_scheduler_states": False}, {"load_module_only": True}):
        again.load_checkpoint(tmp_path, **anew)
        assert (again.global_steps, again.global_samples, again.get_lr()) == (0, 0, [0.0])
        assert torch.equal(again.module.lm_head.weight, engine.module.lm_head.weight)
        before = again.module.lm_head.weight.clone()
        drive(again, 2)  # a rate of zero, twice
        assert torch.equal(again.module.lm_head.weight, before)
        drive(again, 1, start=2)
        assert not torch.equal(again.module.lm_head.weight, before)


def test_a_state_that_is_set_gets_the_groups_numbers():
    engine, front, *_ = made(config())
    drive(engine, 1)
    other, *_ = made(config(optimizer={"type": "AdamW", "params": {"lr": 0.0}}))
    engine.state = other.state
    start = engine.module.lm_head.weight.clone()
    drive(engine, 1, start=1)
    assert front.param_groups[0]["lr"] == 1e-2 and not torch.equal(engine.module.lm_head.weight, start)


def test_a_configuration_of_another_job_is_refused():
    read = fds.DeepSpeedConfig(config(), world_size=2)
    with pytest.raises(fds.DeepSpeedConfigError, match=r"read for 2 ranks, and the job has 1 rank") as error:
        fds.deepspeed.initialize(model=zoo.build("llama"), config=read)
    assert error.value.keys == ("world_size",)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_profile_is_of_one_step_and_comes_once(compiled, monkeypatch):
    from fds.deepspeed import profiles

    said = []
    monkeypatch.setattr(profiles, "write", lambda text, file: said.append((engine.global_steps, text)))
    engine, *_ = made(config(gradient_accumulation_steps=2, flops_profiler={"enabled": True}))
    if compiled:
        engine.step_function = lambda state, batch: engine._built(
            state, batch
        )  # as `engine.compile()`, without its time
    for i in range(3):
        engine.train_batch(iter([{"input_ids": x, "labels": x} for x in rows(i).chunk(2)]))
        engine.eval_batch(iter([{"input_ids": x, "labels": x} for x in rows(i).chunk(2)]))
    assert [step for step, _ in said] == [1] and any("backward" in line for line in said[0][1])


# --- what a client brings ---


BRINGS = {
    "Adam, L2": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "Adam, decoupled": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, lr_decay=0.1, initial_accumulator_value=0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", BRINGS)
def test_optimizers_of_torch_are_followed_and_let_their_parameters_go(name):
    model, plain = zoo.build("llama", training=True), zoo.build("llama", training=True)
    theirs, given = BRINGS[name](plain.parameters()), BRINGS[name](model.parameters())
    engine, *_ = fds.deepspeed.initialize(model=model, optimizer=given, config=config())
    assert sum(p.numel() for g in given.param_groups for p in g["params"]) == 0 and not given.state
    drive(engine, 3)
    for i in range(3):
        plain(input_ids=rows(i), labels=rows(i)).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        theirs.step()
        theirs.zero_grad()
    for k, x in engine.module.named_parameters():
        torch.testing.assert_close(x, plain.get_parameter(k), rtol=0, atol=2e-5)


def test_buffers_that_calls_write_go_from_call_to_call():
    """BatchNorm: running statistics of four calls in two steps."""
    model, plain = zoo.build("convnet", training=True), zoo.build("convnet", training=True)
    given = config(train_batch_size=4, gradient_accumulation_steps=2, optimizer={"type": "SGD", "params": {"lr": 0.0}})
    engine, *_ = fds.deepspeed.initialize(model=model, config=given)
    for i in range(4):
        x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(i))
        plain(x)
        engine.backward(engine(x).square().mean())
        engine.step()
    got = dict(engine.module.named_buffers())
    assert got.keys() == dict(plain.named_buffers()).keys()
    for k, x in plain.named_buffers():
        torch.testing.assert_close(got[k], x)


def test_a_checkpoint_in_the_middle_of_an_accumulation_ends_it(tmp_path):
    engine, *_ = made(config(gradient_accumulation_steps=2))
    drive(engine, 1)
    engine.save_checkpoint(tmp_path)
    want = drive(engine, 1, start=1)
    ids = rows(9).chunk(2)[0]
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.load_checkpoint(tmp_path)
    assert drive(engine, 1, start=1) == pytest.approx(want, abs=1e-6)


def seen(tp):
    data = [{"input_ids": x, "labels": x} for x in rows(0)]
    given = config(train_batch_size=8 if tp == 1 else 4, **({"tensor_parallel": {"autotp_size": tp}} if tp > 1 else {}))
    _, _, loader, _ = fds.deepspeed.initialize(model=zoo.build("llama", training=True), config=given, training_data=data)  # fmt: skip
    return torch.cat([b["input_ids"] for b in loader])


def test_ranks_take_rows_of_their_own_and_tensor_parallel_ones_the_same():
    a, b = ranks.run(2, seen, 1)
    assert len(a) == len(b) == 4
    assert sorted(torch.cat([a, b]).tolist()) == sorted(rows(0).tolist())
    a, b = ranks.run(2, seen, 2)
    assert torch.equal(a, b) and sorted(a.tolist()) == sorted(rows(0).tolist())
