import contextlib
import copy
import io
import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

import tiny
from armchair.data.sources import DataConfig, open_source
from armchair.errors import RequestError, WorkError
from armchair.image.dvae import DVAE, DVAEConfig
from armchair.image.pixels import stack
from armchair.shapes.world import render, scene
from armchair.train.checkpoint import checkpoints
from armchair.train.image_tokenizer import CodeFigures, ImageTokenizerStage, check_codes, code_figures, fixed_images
from armchair.train.loop import Interrupted, fit
from armchair.train.optim import step_size
from armchair.train.recipe import DVAETraining, FitConfig, PriorTraining, Recipe
from armchair.train.report import Report
from train.prior_tiny import EVERY, one_of_two, prior_stage

CPU = torch.device("cpu")


def fit_config(**fields) -> FitConfig:
    defaults = {"steps": 30, "batch_size": 8, "lr": 0.02, "warmup": 5, "precision": "fp32", **EVERY}
    return FitConfig(**{**defaults, **fields})


def train(run: Path, stage=None, config: FitConfig | None = None, **options) -> nn.Module:
    with contextlib.closing(Report(run, io.StringIO())) as report:
        return fit(
            stage or tiny.ToyStage(), config or fit_config(), run / "toy", report, device=CPU, **options
        )


def events(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y)


def files_of(run: Path) -> dict[str, bytes]:
    newest = checkpoints(run / "toy")[-1]
    return {p.name: p.read_bytes() for p in newest.glob("*.safetensors")}


def test_training_lowers_the_loss_and_tells_what_it_does(tmp_path):
    stage = tiny.ToyStage()
    average = train(tmp_path, stage, fit_config(steps=100))
    assert stage.validated[-1] < 0.6 * stage.validated[0] and stage.closed
    assert not average.training and not any(p.requires_grad for p in average.parameters())
    steps = events(tmp_path, "step")
    assert [s["step"] for s in steps] == list(range(1, 101))
    assert all(s["doubled"] == pytest.approx(2 * s["loss"], abs=1e-5) for s in steps)
    assert [s["lr"] for s in steps] == pytest.approx(
        [step_size(i, fit_config(steps=100)) for i in range(100)], abs=1e-6
    )
    assert [v["step"] for v in events(tmp_path, "validation")] == list(range(10, 101, 10))
    assert sorted(p.name for p in (tmp_path / "sheets").iterdir()) == [
        f"toy_{n:08d}.png" for n in (15, 30, 45, 60, 75, 90, 100)
    ]
    assert [p.name for p in checkpoints(tmp_path / "toy")] == ["step_00000090", "step_00000100"]


def test_a_finished_stage_is_not_trained_again(tmp_path):
    first = train(tmp_path)
    stage = tiny.ToyStage(poison=0)
    assert_same_weights(first, train(tmp_path, stage))
    assert len(events(tmp_path, "begin")) == 1


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path):
    constant = {"schedule": "constant"}
    train(tmp_path / "a", config=fit_config(steps=20, **constant))
    longer = train(tmp_path / "a", config=fit_config(steps=30, **constant))
    assert_same_weights(longer, train(tmp_path / "b", config=fit_config(steps=30, **constant)))


@pytest.mark.parametrize("poison", [0, 12, 25])
def test_a_loss_that_is_not_finite_stops_with_one_error_and_the_last_good_state(tmp_path, poison):
    stage = tiny.ToyStage(poison)
    with pytest.raises(WorkError) as error:
        train(tmp_path, stage)
    message = str(error.value)
    assert "\n" not in message and message.startswith("toy: loss nan")
    assert f"step {poison + 1};" in message and str(tmp_path / "toy") in message
    assert stage.closed
    assert [p.name for p in checkpoints(tmp_path / "toy")] == [
        f"step_{n:08d}" for n in (10, 20) if n <= poison
    ]
    # Once the cause is gone, the run goes on as if nothing had been.
    assert_same_weights(train(tmp_path), train(tmp_path / "other"))


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    class Steep(tiny.ToyStage):
        def loss(self, batch, step, part):
            return (0 * self.model(batch).sum()).abs().sqrt(), {}

    with pytest.raises(WorkError, match="toy: loss 0, gradient norm nan at step 1"):
        train(tmp_path, Steep())


def test_stopping_saves_a_state_that_goes_on_exactly(tmp_path):
    straight = train(tmp_path / "straight")
    for stops_after in (3, 9, 20, 21):
        run = tmp_path / str(stops_after)
        calls = iter(range(1, 100))
        with pytest.raises(Interrupted, match=f"stopped after step {stops_after} of toy"):
            train(run, should_stop=lambda calls=calls, last=stops_after: next(calls) == last)
        assert checkpoints(run / "toy")[-1].name == f"step_{stops_after:08d}"
        assert_same_weights(train(run), straight)
        assert files_of(run) == files_of(tmp_path / "straight")


def test_stopping_at_the_last_step_is_to_be_done(tmp_path):
    stage, calls = tiny.ToyStage(), iter(range(1, 100))
    train(tmp_path, stage, should_stop=lambda: next(calls) == 30)
    assert checkpoints(tmp_path / "toy")[-1].name == "step_00000030"


def test_a_plateau_halves_the_step_size_and_is_remembered(tmp_path):
    class Stuck(tiny.ToyStage):
        def validate(self, model):
            return {"loss": 1.0}

    config = fit_config(schedule="plateau", plateau_patience=1, validate_every=5)
    calls = iter(range(1, 100))
    with pytest.raises(Interrupted):
        train(tmp_path, Stuck(), config, should_stop=lambda: next(calls) == 17)
    train(tmp_path, Stuck(), config)
    sizes = [s["lr"] for s in events(tmp_path, "step")]
    assert sizes[5:] == pytest.approx(
        5 * [0.02] + 5 * [0.01] + 5 * [0.005] + 5 * [0.0025] + 5 * [0.00125], abs=1e-6
    )


def test_gradients_are_clipped(tmp_path):
    class Harsh(tiny.ToyStage):
        def loss(self, batch, step, part):
            return 1e6 * super().loss(batch, step, part)[0], {}

    # With such an epsilon an update is in proportion to the clipped gradient, however harsh the loss is.
    start = tiny.ToyStage().model
    config = fit_config(steps=1, clip=0.5, eps=1e3, lr=1.0, warmup=0, ema=0.0, schedule="constant")
    moved = train(tmp_path, Harsh(), config)
    change = torch.cat(
        [(a - b).flatten() for a, b in zip(start.parameters(), moved.parameters(), strict=True)]
    )
    assert change.norm().item() == pytest.approx(0.5 / 1e3, rel=0.01)
    assert events(tmp_path, "step")[0]["grad_norm"] > 1e4


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_batch_in_parts_is_the_batch(tmp_path, count):
    whole = train(tmp_path / "whole", config=fit_config(eps=1e-4))
    parts = train(tmp_path / "parts", config=fit_config(eps=1e-4, accumulate=count))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    losses = [[s["loss"] for s in events(tmp_path / run, "step")] for run in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("count", [2, 4])
def test_parts_at_once_are_the_parts_one_by_one(tmp_path, count):
    threads = torch.get_num_threads()
    one_by_one = train(tmp_path / "one", config=fit_config(eps=1e-4, accumulate=4))
    at_once = [
        train(tmp_path / str(i), config=fit_config(eps=1e-4, accumulate=4, at_once=count)) for i in range(2)
    ]
    assert_same_weights(*at_once)
    for a, b in zip(one_by_one.parameters(), at_once[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    losses = [[s["loss"] for s in events(tmp_path / run, "step")] for run in ("one", "0")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert torch.get_num_threads() == threads


def test_a_priors_parts_at_once_are_the_batch(tmp_path):
    results = []
    for at_once in (1, 2):
        stage = prior_stage(2, at_once=at_once)
        results.append(train(tmp_path / str(at_once), stage, stage.config))
    for a, b in zip(*(r.parameters() for r in results), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_an_error_in_a_part_stops_the_run(tmp_path):
    stage = tiny.ToyStage()
    stage.loss = lambda batch, step, part: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, stage, fit_config(accumulate=2, at_once=2))


def test_what_a_stage_moves_by_itself_is_averaged_and_saved_too(tmp_path):
    class Counting(tiny.ToyStage):
        def __init__(self):
            super().__init__()
            self.model.register_buffer("count", torch.zeros(()))

        def after_update(self, step: int) -> None:
            self.model.count += 1

    stage = Counting()
    average = train(tmp_path, stage, fit_config(steps=4, ema=0.75))
    expected = 0.0
    for step in range(4):
        expected += (1 - min(0.75, (1 + step) / (10 + step))) * (step + 1 - expected)
    assert float(stage.model.count) == 4 and float(average.count) == pytest.approx(expected)
    assert float(train(tmp_path, Counting(), fit_config(steps=4, ema=0.75)).count) == float(average.count)


def dvae_after_training(folder: Path, encoder_scale: float) -> tuple[DVAE, DVAE]:
    """A dVAE as it was, and after three updates on shapes."""
    data = DataConfig(train=("shapes:train,length=16",), resolution=64)
    training = DVAETraining(
        steps=3, batch_size=4, lr=1e-3, warmup=0, ema=0.0, encoder_scale=encoder_scale, weight_decay=0.1
    )
    model = tiny.dvae(resolution=64, patch=8)
    recipe = Recipe(
        name="tiny",
        data=data,
        image_tokenizer=model.config,
        image_tokenizer_training=training,
        prior_training=PriorTraining(steps=1, batch_size=1, lr=1),
    )
    start = copy.deepcopy(model)
    source = open_source(data.train, data)
    train(folder, ImageTokenizerStage(recipe, model, source, fixed_images(source, 4, 64)), training)
    return start, model


@pytest.mark.parametrize("encoder_scale", [0.0, 1.0])
def test_an_encoder_of_scale_0_keeps_every_bit(tmp_path, encoder_scale):
    start, model = dvae_after_training(tmp_path, encoder_scale)
    for (name, before), after in zip(start.named_parameters(), model.parameters(), strict=True):
        learns = encoder_scale > 0 or not name.startswith(("encoder.", "to_logits."))
        assert torch.equal(before, after) != learns, name


def test_a_priors_batch_in_four_parts_is_the_batch(tmp_path):
    results = []
    for count in (1, 4):
        stage = prior_stage(count)
        results.append(train(tmp_path / str(count), stage, stage.config))
    for a, b in zip(*(r.parameters() for r in results), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_narrow_priors_matrices_move_further_in_a_step(tmp_path):
    once = {"steps": 1, "warmup": 0, "schedule": "constant", "weight_decay": 0.0, "eps": 1e-12, "clip": 1e9}
    stage = prior_stage(**{**once, "lr": 1e-4, "ema": 0.0})
    head = stage.model.image_head
    weight, bias = head.weight.clone(), head.bias.clone()
    train(tmp_path, stage, stage.config)
    assert (head.bias - bias).abs().max().item() == pytest.approx(1e-4, rel=0.02)
    assert (head.weight - weight).abs().max().item() == pytest.approx(1e-4 * 256 / 16, rel=0.02)


def test_a_priors_batches_are_a_function_of_the_step():
    late, stream = prior_stage().batches(3), prior_stage().batches(0)
    batches = [next(stream) for _ in range(5)]
    assert all(torch.equal(a, b) for a, b in zip(next(late), batches[3], strict=True))
    text, codes = batches[0]
    assert text.shape == (8, 6) and codes.shape == (8, 16) and text.dtype == codes.dtype == torch.int64
    assert not torch.equal(batches[0][1], batches[1][1])


@pytest.mark.parametrize("world", [2, 4])
def test_what_ranks_see_is_together_the_batch(world):
    whole = next(prior_stage().batches(2))
    shares = [next(prior_stage().batches(2, rank, world)) for rank in range(world)]
    for of_all, *of_ranks in zip(whole, *shares, strict=True):
        assert torch.equal(torch.cat(of_ranks), of_all)
    with pytest.raises(RequestError, match="a multiple of the number of ranks"):
        next(prior_stage().batches(0, 0, 3))


def test_two_processes_train_what_one_does(tmp_path):
    """With the noise that one sees in two parts; one of the two writes."""
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    stage = prior_stage(2, dropout=0.2)
    alone = train(tmp_path / "alone", stage, stage.config).state_dict()
    for name, w in alone.items():
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], w, rtol=1e-3, atol=1e-4)
    told = [(tmp_path / f"rank{rank}/log.jsonl").read_text() for rank in range(2)]
    assert told[0].count('"step"') and not told[1]


@pytest.mark.parametrize("share", [0.0, 1.0, 0.5])
def test_captions_are_left_out_as_often_as_asked(share):
    stage = prior_stage(caption_dropout=share, batch_size=400)
    pad = stage.text_tokenizer.pad_id
    (text, _), (later, _) = next(stage.batches(0)), next(stage.batches(1))
    empty = (text == pad).all(1)
    assert abs(float(empty.float().mean()) - share) < 0.08
    assert torch.equal(empty, (later == pad).all(1)) == (share in (0, 1))  # others in each step


def test_dropout_differs_by_step_and_part_and_is_not_there_in_validation():
    stage = prior_stage(dropout=0.2, code_dropout=0.2, code_noise=0.2)
    for p in stage.model.parameters():
        p.data.normal_(std=0.3)
    part = next(stage.batches(0))

    def loss(step: int, number: int) -> float:
        with torch.no_grad():
            return float(stage.loss(part, step, number)[0])

    assert loss(0, 0) == loss(0, 0) and len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3
    assert stage.validate(stage.model) == stage.validate(stage.model)
    stage.config = replace(stage.config, dropout=0.0, code_dropout=0.0)
    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3  # what is left is noise
    stage.config = replace(stage.config, code_noise=0.0)
    assert loss(0, 0) == loss(0, 1) == loss(1, 0)


def test_the_first_updates_look_at_a_part_of_each_picture_and_the_others_at_all():
    stage = prior_stage(2, steps=6)
    stage.config = replace(stage.config, thinned=0.5, thinned_codes=7)
    stage.model = tiny.prior(stage.model.shape, "full")
    part, looked_at = next(stage.batches(0)), []
    states = stage.model.states

    def watched(*args, **options):
        looked_at.append(states(*args, **options))
        return looked_at[-1]

    with mock.patch.object(stage.model, "states", watched), torch.no_grad():
        losses = [float(stage.loss(part, step, number)[0]) for step in (0, 2, 3, 5) for number in (0, 1)]
        assert losses[0] == float(stage.loss(part, 0, 0)[0])
    text = stage.model.shape.text_length
    assert [x.shape[1] - text for x in looked_at] == 4 * [7] + 4 * [16] + [7]
    assert len(set(losses[:4])) == 4 and len(set(losses[4:])) == 1  # other codes in each update and part


def test_smoothing_changes_what_is_minimised_and_not_what_is_told():
    stage = prior_stage(label_smoothing=0.3)
    seed = torch.Generator().manual_seed(0)
    for p in stage.model.parameters():
        p.data.normal_(std=0.3, generator=seed)
    stage.model.image_head.weight.data.mul_(20)  # far from equal shares, which smoothing leaves as they are
    part = next(stage.batches(0))
    smoothed, figures = stage.loss(part, 0, 0)
    validated = stage.validate(stage.model)
    stage.config = replace(stage.config, label_smoothing=0.0)
    plain, told = stage.loss(part, 0, 0)
    assert figures == told and validated == stage.validate(stage.model)
    assert abs(float(smoothed.detach()) - float(plain.detach())) > 0.01


def test_a_prior_is_trained_and_validated_without_the_logits_of_a_whole_batch(monkeypatch):
    stage = prior_stage()
    expected, figures = float(stage.loss(next(stage.batches(0)), 0, 0)[0].detach()), stage.validate(stage.model)
    monkeypatch.setattr(type(stage.model), "forward", lambda *_: pytest.fail("all logits at once"))
    assert float(stage.loss(next(stage.batches(0)), 0, 0)[0].detach()) == expected
    assert stage.validate(stage.model) == figures


class Painter(nn.Module):
    """Decodes whatever it gets into the next of the pictures it was given."""

    def __init__(self, pictures: torch.Tensor):
        super().__init__()
        self.pictures = nn.Parameter(pictures, requires_grad=False)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        taken, self.pictures.data = self.pictures[: len(codes)], self.pictures[len(codes) :]
        return taken


def test_prompt_accuracy_is_the_share_of_right_pictures():
    splits = ("val", "held-form-colour")
    scenes = [scene(i, split=split, objects=objects) for split in splits for objects in (1, 2) for i in range(4)]
    pictures = stack([render(s) for s in scenes])
    pictures[5] = pictures[8:10] = 0.5  # nothing in one of four of two objects, in two of held-out pairs
    stage = prior_stage(accuracy_prompts=4)
    stage.image_tokenizer = Painter(pictures)
    figures = stage.validate(stage.model)
    assert {name: share for name, share in figures.items() if name.startswith("accuracy")} == {
        "accuracy_1": 1.0, "accuracy_2": 0.75, "accuracy_held_1": 0.5, "accuracy_held_2": 1.0
    }  # fmt: skip
    assert not any(name.startswith("accuracy") for name in prior_stage().validate(stage.model))


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        (CodeFigures(20.0, 0.01, 5.0), r"collapsed: 1\.0% of 32 codes .*kl_weight .*autoencoder_training"),
        (CodeFigures(20.0, 0.50, 1.5), r"collapsed: .*perplexity 1\.5"),
        (CodeFigures(12.0, 0.50, 9.0), r"12\.0 dB, less than image_tokenizer_training\.min_psnr 15"),
    ],
)
def test_codes_that_no_prior_can_use_stop_the_run(figures, message):
    config = DVAETraining(steps=1, batch_size=1, lr=1e-3)
    check_codes(CodeFigures(16.0, 0.06, 2.5), config, DVAEConfig(codebook_size=32))
    with pytest.raises(WorkError, match=message):
        check_codes(figures, config, DVAEConfig(codebook_size=32))


def test_code_figures_against_the_literal_ones():
    model, images = tiny.dvae(), tiny.pictures(7, 16)
    figures = code_figures(model, images, batch_size=3)
    with torch.no_grad():
        codes = model.encode(images)
        errors = (model.decode(codes) - images).square().flatten(1).mean(1)
    assert figures.psnr == pytest.approx(sorted(-10 * torch.log10(errors))[3].item(), abs=1e-4)
    assert figures.usage == pytest.approx(len(codes.unique()) / 32)
    p = codes.unique(return_counts=True)[1] / codes.numel()
    assert figures.perplexity == pytest.approx((-(p * p.log()).sum()).exp().item(), rel=1e-5)
