"""The training loop: what a step adds up to, what it leaves alone, and that stopping and going on changes nothing."""

import hashlib
import os
import signal
from dataclasses import replace

import pytest
import torch
from command import HEAVY
from small_run import SIZE, small_config, write_pictures, write_small_model
from torch import multiprocessing

from tudsr_core.pictures.files import PictureError
from tudsr_core.training.networks import build_trained
from tudsr_core.training.samples import Batch, Pictures, batches
from tudsr_core.training.stages import Chunk, chunks_of, join, looped, split
from tudsr_core.training.state import saved_steps
from tudsr_core.training.trainer import Trainer, TrainingError

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload([*HEAVY, "peft", "accelerate"])


@pytest.fixture
def root(tmp_path):
    """A folder with pictures and a small model."""
    write_pictures(tmp_path / "pictures")
    write_small_model(tmp_path / "model.safetensors")
    return tmp_path


def trainer_of(root, stage=1, **changes):
    """A trainer on the small model, whose backbone is stage one."""
    return Trainer(small_config(root, root / "model.safetensors", stage, **changes), stage)


def sd_trainer_of(root, small_sd, stage=1, **changes):
    """A trainer on Stable Diffusion in miniature, in stage two behind an adapter."""
    changes = {"model": {"stage_one": small_sd / "one"}} | changes if stage == 2 else changes
    return Trainer(small_config(root, small_sd / "base", stage, **changes), stage)


def run(trainer, steps=None):
    seen = []
    if steps:
        trainer.config = replace(trainer.config, optimizer=replace(trainer.config.optimizer, steps=steps))
    trainer.run(lambda step, numbers: seen.append(numbers))
    return seen


def gradients(trainer):
    return torch.cat([p.grad.flatten() for p in trainer.parameters.values()])


def far(a, b):
    return float((a - b).norm() / b.norm())


def shaken(trainer):
    """Give the fresh adapter, which changes nothing yet, random weights: only then do all of them have a gradient."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return trainer


def test_both_stages_train_and_the_loss_of_one_picture_falls(root):
    for stage in (1, 2):
        trainer = trainer_of(root, stage, optimizer={"accumulation": 1, "steps": 6})
        chunks = [next(trainer._stream())]
        losses = [trainer.take_step(chunks) for _ in range(6)]
        assert losses[-1]["mae"] + losses[-1]["dists"] < losses[0]["mae"] + losses[0]["dists"]
        assert losses[0].keys() == {
            "mae", "dists", "adversarial", "critic_fake", "critic_real", "norm", "critic_norm",
        }  # fmt: skip
        trained = [name for name, p in trainer.network.named_parameters() if p.requires_grad]
        assert trained and all("lora_" in name for name in trained)


def test_the_loop_over_chunks_has_the_gradient_of_one_batch_of_them_and_not_of_the_picture(root):
    trainer = shaken(trainer_of(root, 2, optimizer={"accumulation": 1}, discriminator={"augment": False}))
    chunks = [next(stream) for stream in [trainer._stream()] for _ in range(4)]
    assert [chunk.place for chunk in chunks] == [0, 1, 2, 3] and chunks[0].low.shape == (1, 3, SIZE, SIZE)
    for chunk in chunks:
        trainer.add_gradients(chunk, 1 / 4)
    loop, critic_loop = gradients(trainer), [p.grad.clone() for p in trainer.critic_module.heads.parameters()]
    trainer._zero()
    low, sharp = (torch.cat([getattr(chunk, name) for chunk in chunks]) for name in ("low", "sharp"))
    trainer.add_gradients(Chunk(low, sharp, chunks[0].numbers * 4), 1.0)
    assert far(loop, gradients(trainer)) < 1e-4
    for once, at_once in zip(critic_loop, trainer.critic_module.heads.parameters(), strict=True):
        assert far(once, at_once.grad) < 1e-4
    trainer._zero()
    whole = Chunk(join(list(low.split(1)), 2), join(list(sharp.split(1)), 2), chunks[0].numbers)
    trainer.critic = trainer.critic_module = None  # its heads are made for one size
    trainer.add_gradients(whole, 1.0)
    large = gradients(trainer)
    trainer._zero()
    for chunk in chunks:
        trainer.add_gradients(chunk, 1 / 4)
    assert far(gradients(trainer), large) > 1e-2


def saved_bytes(trainer, chunks):
    """Bytes that the forward pass of the generator keeps for the backward pass, of all chunks at once or one by one."""
    own = {p.data_ptr() for p in trainer.network.parameters()}
    most, kept = 0, {}

    def pack(x):
        if x.data_ptr() not in own:
            kept[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    for chunk in chunks:
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            made = trainer.generator(chunk.low)
            sum(trainer.objectives.of_generator(made, chunk, trainer.critic_module).values()).backward()
        most = max(most, sum(kept.values()))
    return most


def test_the_loop_keeps_the_activations_of_one_chunk(root):
    trainer = shaken(trainer_of(root, 2, optimizer={"accumulation": 1}, loss={"adversarial": 0}, data={"size": 64}))
    chunks = [next(stream) for stream in [trainer._stream()] for _ in range(4)]
    one, loop = saved_bytes(trainer, chunks[:1]), saved_bytes(trainer, chunks)
    low, sharp = (torch.cat([getattr(chunk, name) for chunk in chunks]) for name in ("low", "sharp"))
    at_once = saved_bytes(trainer, [Chunk(low, sharp, chunks[0].numbers * 4)])
    assert loop <= 1.1 * one
    assert 3.5 * one < at_once < 4.1 * one


def test_each_pass_leaves_gradients_on_its_own_network_alone(root):
    trainer = shaken(trainer_of(root))
    chunk = next(trainer._stream())
    made = trainer.generator(chunk.low)
    sum(trainer.objectives.of_generator(made, chunk, trainer.critic_module).values()).backward()
    assert all(p.grad is None for p in trainer.critic_module.parameters())
    assert all(p.requires_grad for p in trainer.critic_module.heads.parameters())
    before = gradients(trainer).clone()
    sum(trainer.objectives.of_critic(made, chunk, trainer.critic).values()).backward()
    assert torch.equal(gradients(trainer), before) and before.abs().sum() > 0
    assert all(p.grad is not None for p in trainer.critic_module.heads.parameters())
    assert all(p.grad is None for p in trainer.critic_module.features.parameters())


def test_stage_two_leaves_stage_one_as_it_is(root, small_sd):
    file = small_sd / "one" / "unet_lora_adapter" / "adapter_model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    trainer = sd_trainer_of(root, small_sd, 2, optimizer={"accumulation": 1}, data={"size": 64})
    before = [p.clone() for p in trainer.first.parameters()]
    adapter = [p.clone() for p in trainer.parameters.values()]
    run(trainer, 1)
    assert all(map(torch.equal, before, trainer.first.parameters()))
    assert not any(map(torch.equal, adapter, trainer.parameters.values()))
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
    own = {p.data_ptr() for p in trainer.network.unet.parameters()}
    assert not own & {p.data_ptr() for p in trainer.first.unet.parameters()}


def everything(trainer):
    return {f"{part}/{name}": value for part, values in trainer.parts().items() for name, value in values.items()}


@pytest.mark.parametrize(("stage", "per_chunk"), [(1, False), (2, False), (2, True)])
def test_stop_and_resume_equals_uninterrupted_bit_for_bit(root, stage, per_chunk):
    changes = {"run": {"ema": 0.9}, "optimizer": {"step_per_chunk": per_chunk, "accumulation": 1}}
    whole = trainer_of(root, stage, **changes)
    numbers = run(whole, 3)
    for file in saved_steps(whole.config):
        file.unlink()
    halves = trainer_of(root, stage, **changes)
    first = run(halves, 2)
    torch.manual_seed(12345)  # nothing may depend on torch's own stream
    again = trainer_of(root, stage, **changes)
    assert again.resume() == 2
    assert first + run(again, 3) == numbers
    wanted, made = everything(whole), everything(again)
    assert wanted.keys() == made.keys() and {"average/", "critic_optimizer/"} <= {
        f"{k.partition('/')[0]}/" for k in made
    }
    assert [key for key in wanted if not torch.equal(wanted[key], made[key])] == []


def test_other_settings_are_refused_on_resume_and_some_may_change(root):
    trainer = trainer_of(root)
    run(trainer, 1)
    with pytest.raises(ValueError, match=r"\[lora\] alpha, \[optimizer\] rate changed since step-0000001"):
        trainer_of(root, lora={"alpha": 8}, optimizer={"rate": 1e-2}).resume()
    assert trainer_of(root, optimizer={"steps": 9}, run={"keep": 1}).resume() == 1


def test_a_signal_ends_after_the_step_with_a_checkpoint(root):
    trainer = trainer_of(root, optimizer={"steps": 50})
    before = signal.getsignal(signal.SIGTERM)

    def report(step, numbers):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert trainer.run(report) is False
    assert trainer.step == 3 and [file.name for file in saved_steps(trainer.config)] == ["step-0000003.safetensors"]
    assert signal.getsignal(signal.SIGTERM) == before


def _die_while_writing(config):
    from tudsr_core.weights import tensor_files

    def killed(tensors, path, metadata):
        path.write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)

    tensor_files.save_file = killed
    trainer = Trainer(config, 1)
    trainer.resume()
    run(trainer, 2)


def test_killed_while_writing_a_checkpoint_the_one_before_loads(root):
    trainer = trainer_of(root)
    run(trainer, 1)
    child = CHILDREN.Process(target=_die_while_writing, args=(trainer.config,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    folder = saved_steps(trainer.config)[0].parent
    assert len(list(folder.iterdir())) == 2, "the half-written file lies there"
    again = trainer_of(root)
    assert again.resume() == 1
    run(again, 2)
    assert sorted(file.name for file in folder.iterdir()) == ["step-0000001.safetensors", "step-0000002.safetensors"]


def test_only_the_newest_checkpoints_are_kept(root):
    trainer = trainer_of(root, run={"save_every": 1, "keep": 2}, loss={"adversarial": 0})
    run(trainer, 4)
    assert [file.name for file in saved_steps(trainer.config)] == [
        "step-0000003.safetensors",
        "step-0000004.safetensors",
    ]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_without_a_number_changes_nothing_and_many_end_the_training(root, where):
    trainer = trainer_of(root, run={"patience": 3})
    chunks = [next(stream) for stream in [trainer._stream()] for _ in range(2)]
    trainer.take_step(chunks)
    before = {name: value.clone() for name, value in everything(trainer).items()}
    if where == "loss":
        chunks[1].sharp.fill_(float("nan"))
    else:
        next(iter(trainer.parameters.values())).register_hook(lambda gradient: gradient * float("inf"))
    assert trainer.take_step(chunks)["skipped"] == 1
    now = everything(trainer)
    # Power iterations are no step of an optimiser; they follow the weights, which stay.
    changed = [
        name for name in before if not torch.equal(before[name], now[name]) and not name.endswith(("._u", "._v"))
    ]
    assert changed == []
    trainer.take_step(chunks)
    with pytest.raises(TrainingError, match="no finite loss in 3 steps up to step 4; lower the rate"):
        trainer.take_step(chunks)


def test_accumulated_pictures_are_one_mean_and_clipped_once(root):
    four = shaken(trainer_of(root, optimizer={"accumulation": 4, "clip": 1e9}))
    chunks = [next(stream) for stream in [four._stream()] for _ in range(4)]
    for chunk in chunks:
        four.add_gradients(chunk, 1 / 4)
    added = gradients(four)
    four._zero()
    batch = Chunk(
        *(torch.cat([getattr(c, n) for c in chunks]) for n in ("low", "sharp")),
        tuple(n for c in chunks for n in c.numbers),
    )
    four.add_gradients(batch, 1.0)
    assert far(added, gradients(four)) < 1e-4
    norm = float(gradients(four).norm())
    four._zero()
    assert four.take_step(chunks)["norm"] == pytest.approx(norm, rel=1e-3)


def _one_of_two(rank, config, port, where):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    torch.set_num_threads(1)
    trainer = shaken(Trainer(config, 2))
    calls = []
    reduce = trainer.accelerator.reduce
    trainer.accelerator.reduce = lambda *values: calls.append(1) or reduce(*values)
    assert trainer.accelerator.num_processes == 2 and trainer.accelerator.distributed_type == "MULTI_CPU"
    trainer.run(lambda step, numbers: None)
    assert len(calls) == config.optimizer.steps
    torch.save({k: v.detach() for k, v in everything(trainer).items()}, where / f"{rank}.pt")


def test_two_processes_equal_one_on_the_joined_data_and_each_other(root):
    """gloo on the CPU, chunks in a loop, both networks; the rates are small, since Adam makes 1e-9 of 0 a full step."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    changes = {"optimizer": {"accumulation": 1, "steps": 2, "rate": 1e-5, "critic_rate": 1e-5}}
    alone = shaken(trainer_of(root, 2, **{"optimizer": changes["optimizer"] | {"accumulation": 2}}))
    run(alone)
    config = replace(alone.config, output=root / "two", optimizer=replace(alone.config.optimizer, accumulation=1))
    multiprocessing.start_processes(_one_of_two, (config, port, root), nprocs=2, start_method="forkserver")
    first, second = (torch.load(root / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    wanted = everything(alone)
    assert (
        max(float((first[key] - wanted[key].detach()).abs().max()) for key in wanted if not key.startswith("optimizer"))
        < 1e-6
    )
    assert [file.name for file in saved_steps(config)] == ["step-0000002.safetensors"]


@pytest.mark.parametrize("kind", ["model file", "diffusers"])
def test_gradient_checkpointing_changes_no_gradient(root, small_sd, kind):
    found = []
    for on in (False, True):
        changes = {"run": {"gradient_checkpointing": on}, "loss": {"adversarial": 0}}
        made = trainer_of(root, **changes) if kind == "model file" else sd_trainer_of(root, small_sd, **changes)
        trainer = shaken(made)
        chunk = next(trainer._stream())
        trainer.add_gradients(chunk, 1.0)
        found.append((gradients(trainer), saved_bytes(trainer, [chunk])))
    assert far(found[1][0], found[0][0]) < 1e-5
    assert found[1][1] < 0.8 * found[0][1]


def test_bfloat16_is_near_float32_and_latents_may_be_drawn(root, small_sd):
    from accelerate.state import AcceleratorState

    losses = []
    for precision, posterior in (("fp32", "mode"), ("fp32", "sample"), ("bf16", "sample")):
        AcceleratorState._reset_state()  # it is one for a process
        how = {"precision": precision, "base_precision": precision}
        trainer = sd_trainer_of(root, small_sd, run=how, model={"posterior": posterior}, optimizer={"accumulation": 1})
        losses.append(run(trainer, 1)[0])
        assert all(p.dtype == torch.float32 for p in trainer.parameters.values())
    AcceleratorState._reset_state()
    assert losses[2]["mae"] == pytest.approx(losses[1]["mae"], rel=0.05)
    assert losses[0] != losses[1] != losses[2]


def test_the_embedded_model_is_a_base_of_stage_two(root):
    config = small_config(root, "embedded", 2, optimizer={"accumulation": 1}, run={"gradient_checkpointing": True})
    trainer = Trainer(config, 2)
    assert trainer.first.step.t == 200
    numbers = run(trainer, 1)
    assert 0 < numbers[0]["mae"] < 0.5  # its stage one is trained


def test_samples_follow_from_their_number(root):
    config = small_config(root, root / "model.safetensors").data
    one = Pictures(config, 7)
    few = [next(stream) for stream in [batches(one, 0)] for _ in range(6)]
    later = next(batches(Pictures(replace(config, workers=1), 7), 4))
    assert later.numbers == few[4].numbers == (4,)
    assert torch.equal(later.sharp, few[4].sharp) and torch.equal(later.low, few[4].low)
    shares = [
        [next(stream).numbers for stream in [batches(one, 0, process, 2)] for _ in range(3)] for process in (0, 1)
    ]
    assert sorted(shares[0] + shares[1]) == [(n,) for n in range(6)]
    assert not torch.equal(next(batches(Pictures(config, 8), 4)).sharp, later.sharp)
    assert later.sharp.shape == later.low.shape == (1, 3, SIZE, SIZE)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_one_line(root, workers):
    config = replace(small_config(root, root / "model.safetensors").data, workers=workers)
    damaged = root / "pictures" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:400])
    with pytest.raises(PictureError, match=r"1\.png is damaged") as caught:
        for _ in zip(range(3), batches(Pictures(config, 7), 0), strict=False):
            pass
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_chunks_are_cut_in_reading_order_from_what_stage_one_made(noise):
    pictures = noise(2, 3, 8, 8)
    assert torch.equal(join(split(pictures, 2), 2), pictures)
    assert torch.equal(split(pictures, 2)[1], pictures[..., :4, 4:])
    cut = looped(lambda low: low * 0 + 0.25, 2)
    made = list(chunks_of([Batch((5, 6), pictures, noise(2, 3, 4, 4))] * 2, cut, torch.device("cpu"), skip=3))
    assert [chunk.place for chunk in made] == [3, 0, 1, 2, 3] and made[0].numbers == (5, 6)
    assert torch.allclose(made[0].low, torch.full((2, 3, 4, 4), 0.25))
    assert torch.equal(made[2].sharp, pictures[..., :4, 4:])


def test_a_fresh_adapter_changes_nothing_and_follows_from_the_seed(root, noise):
    config = small_config(root, root / "model.safetensors")
    first, again = build_trained(config), build_trained(config)
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    picture = noise(1, 3, SIZE, SIZE)
    with torch.no_grad(), first.unet.disable_adapter():
        plain = first(picture)
    assert torch.equal(first(picture), plain)
