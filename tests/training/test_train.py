"""The loop against a naive one written here, and each thing a configuration can ask of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from torch.nn import functional as F

from irkd_dist import checkpoint, configured, evaluation, networks, typed
from irkd_dist import config as configuration
from irkd_dist.data import sampler
from irkd_dist.errors import UserError
from irkd_dist.eventlog import read_events, read_samples
from irkd_dist.training import panels
from irkd_dist.training.train import train


def run(file: Path, *overrides: str, name: str = "run") -> tuple[Path, list[dict]]:
    train(configuration.load(file, [f"name={name}", *overrides]))
    return file.parent / name, read_events(file.parent / name)


def of(events: list[dict], kind: str) -> list[dict]:
    return [e for e in events if e["event"] == kind]


def stock_images(folder: Path, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All training images of a resolution in shard order, through stock webdataset and the manifest's JSON."""
    manifest = json.loads((folder / "manifest.json").read_text())
    urls = [str(folder / f"r{resolution}" / s["name"]) for s in manifest["shards"][f"r{resolution}"]["train"]]
    data = wds.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png", "cls")
    images, labels = zip(*data, strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(manifest[k]).view(3, 1, 1) for k in ("mean", "std"))
    return (pixels - mean) / std, torch.tensor(labels)


def maps(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, graph: bool, last: str) -> tuple:
    """Output and min-max normalised gradient maps at the first, second and last tap, by hooks and autograd."""
    kept = []
    modules = [model.get_submodule(n) for n in ("blocks.0", "blocks.1", last)]
    handles = [m.register_forward_hook(lambda _m, _i, out: kept.append(out)) for m in modules]
    out = model(x)
    for handle in handles:
        handle.remove()
    logits = (out[0] + out[1]) / 2 if isinstance(out, tuple) else out
    gradients = torch.autograd.grad(logits[torch.arange(len(y)), y].sum(), kept, create_graph=graph)
    result = []
    for g in gradients:
        m = g[:, model.num_prefix_tokens :].abs().amax(2)
        low, high = m.amin(1, keepdim=True), m.amax(1, keepdim=True)
        result.append((m - low) / (high - low + 1e-8))
    return out, result


def naive(config: configuration.Config, teacher_folder: Path) -> list[float]:
    """Two stages, AdamW anew at each, CE + KD + 0.8 saliency: nothing but torch."""
    torch.manual_seed(config.seed)
    student, _, _ = configured.create_student(config, 10)
    teacher = networks.load(teacher_folder).model
    for model in (student, teacher):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
    folder, losses, epoch = Path(config.data.shards), [], 0
    for stage in configuration.stages(config):
        images, labels = stock_images(folder, stage.resolution)
        free = [p for n, p in student.named_parameters() if p.ndim < 2 or "token" in n or n == "pos_embed"]
        decayed = [
            p for n, p in student.named_parameters() if not (p.ndim < 2 or "token" in n or n == "pos_embed")
        ]
        groups = [{"params": decayed, "weight_decay": 1e-4}, {"params": free, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=3e-4)
        for _ in range(stage.epochs or 0):
            order = sampler.order(config.seed, epoch, len(labels))
            for start in range(0, len(labels), config.data.batch):
                ids = torch.tensor(order[start : start + config.data.batch])
                x, y = images[ids], labels[ids]
                out_t, maps_t = maps(teacher, x, y, False, "blocks.3.norm1")
                (cls, dist), maps_s = maps(student.train(), x, y, True, "blocks.2.norm1")
                ce = F.cross_entropy(cls, y)
                kd = 16 * F.kl_div(
                    F.log_softmax(dist / 4, 1), F.softmax(out_t.detach() / 4, 1), reduction="batchmean"
                )
                s = sum(F.mse_loss(a, b.detach()) for a, b in zip(maps_s, maps_t, strict=True)) / 3
                loss = ce + kd + 0.8 * s
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            epoch += 1
    return losses


def test_the_loop_computes_what_a_naive_loop_does(student_yaml: Path, teacher: Path) -> None:
    plain = ["augment.padding=0", "augment.flip=false"]
    _, events = run(student_yaml, *plain)
    config = configuration.load(student_yaml, ["name=run", *plain])
    expected = naive(config, teacher)
    ours = [e["total"] for e in of(events, "train")]
    assert len(ours) == len(expected) == 16
    np.testing.assert_allclose(
        ours[:8], expected[:8], rtol=1e-4
    )  # AdamW's epsilon enlarges rounding, step by step
    np.testing.assert_allclose(ours, expected, rtol=1e-3)
    assert abs(ours[0] - expected[0]) < 1e-6


def events_teacher(events: list[dict]) -> str:
    return next(e["decision"]["teacher"] for e in events if e.get("decision", {}).get("action") == "advance")


def test_events_tell_the_run(student_yaml: Path) -> None:
    folder, events = run(student_yaml)
    assert [e["event"] for e in events if e["event"] not in ("train", "snapshot", "checkpoint", "decision")] == [
        "start", "teacher", "flops", "flops", "stage", "evaluation", "probe", "evaluation", "probe", "transition",
        "stage", "evaluation", "probe", "evaluation", "probe", "summary",
    ]  # fmt: skip
    assert of(events, "transition")[0] | {"time": 0} == {
        "event": "transition", "step": 8, "time": 0, "stage": 0, "to": 1, "resolution": 16, "reason": "2 epochs done",
        "reload": None, "policy": "reset", "action": "advance", "best": False, "batch": 32, "lr": 3e-4,
        "teacher": events_teacher(events),
    }  # fmt: skip
    assert of(events, "teacher")[0]["resolutions"] == [12, 16]
    assert any("blocks.2.norm1 | blocks.3.norm1" in note for note in events[0]["notes"])
    assert [stage for stage, _, _ in panels.load(folder)[0]] == [0, 0, 1, 1]
    assert {"images", "student", "teacher"} <= set(panels.load(folder)[0][0][2])


def test_a_void_tap_is_named_at_the_start(student_yaml: Path) -> None:
    _, events = run(student_yaml, "loss.saliency.taps=[first,2]", "curriculum.epochs=1")
    assert any("void taps" in n and "blocks.2 | blocks.3" in n for n in events[0]["notes"])
    with pytest.raises(UserError, match="every tap is void"):
        run(student_yaml, "loss.saliency.taps=[2]", name="other")


def moments(folder: Path) -> dict[str, torch.Tensor]:
    newest, _ = checkpoint.newest(folder / "checkpoints")
    assert newest is not None
    return checkpoint.load(newest)[1]


@pytest.mark.parametrize(("policy", "steps"), [("reset", 8), ("carry", 16), ("rewarm", 16)])
def test_policies_decide_how_old_the_moments_are(student_yaml: Path, policy: str, steps: int) -> None:
    folder, events = run(student_yaml, f"optim.policy={policy}", "optim.rewarm_steps=4")
    assert {float(v) for k, v in moments(folder).items() if k.startswith("step.")} == {float(steps)}
    rates = [e["lr"] / 3e-4 for e in of(events, "train")]
    warm = [0.25, 0.5, 0.75, 1.0] if policy == "rewarm" else [1.0] * 4
    assert rates[8:12] == pytest.approx(warm)
    assert rates[:8] == pytest.approx([1.0] * 8)


def test_schedule_restarts_under_reset_and_goes_on_under_carry(student_yaml: Path) -> None:
    cosine = ["optim.schedule.kind=cosine", "loss.saliency.gamma=0"]
    _, reset = run(student_yaml, *cosine)
    _, carry = run(student_yaml, *cosine, "optim.policy=carry", name="carry")
    rates = [e["lr"] for e in of(reset, "train")]
    assert rates[:8] == rates[8:]
    going_on = [e["lr"] for e in of(carry, "train")]
    assert going_on == sorted(going_on, reverse=True)
    assert going_on[8] == pytest.approx(3e-4 * (1 + np.cos(np.pi * 8 / 15)) / 2)


def test_stages_may_start_from_the_best_and_end_early(student_yaml: Path) -> None:
    early = [
        "curriculum.epochs=6",
        "curriculum.patience=1",
        "curriculum.start_from=best",
        "optim.policy=carry",
    ]
    folder, events = run(student_yaml, *early, "optim.lr=1e-2", "loss.saliency.gamma=0")
    ended = of(events, "transition")[0]
    assert "no better validation accuracy for 1 epochs" in ended["reason"]
    of_stage = [e for e in of(events, "evaluation") if e["stage"] == 0]
    best = max(of_stage, key=lambda e: e["accuracy"])
    assert ended["reload"].endswith(f"{best['step']:08d}")
    reloaded = checkpoint.load(folder / ended["reload"])
    steps = {float(v) for k, v in reloaded[1].items() if k.startswith("step.")}
    assert steps == {float(best["step"])}  # its own moments came with it


def test_down_as_well_as_up(student_yaml: Path) -> None:
    _, events = run(
        student_yaml, "curriculum.stages=[{resolution: 16},{resolution: 8}]", "curriculum.epochs=1"
    )
    assert [e["resolution"] for e in of(events, "stage")] == [16, 8]


def test_the_kd_weight_follows_the_teacher(student_yaml: Path) -> None:
    _, events = run(
        student_yaml, "loss.kd.follow_teacher=true", "curriculum.epochs=1", "loss.saliency.gamma=0"
    )
    probe = of(events, "teacher")[0]
    best = max(probe["accuracy"])
    expected = [max((a - 0.1) / (best - 0.1), 0) if best > 0.1 else 0 for a in probe["accuracy"]]
    assert [e["alpha"] for e in of(events, "stage")] == pytest.approx(expected)


def test_teacher_checkpoints_by_stage(student_yaml: Path, teacher: Path) -> None:
    _, events = run(student_yaml, "teacher.schedule=aligned", "curriculum.epochs=1")
    note = next(n for n in events[0]["notes"] if n.startswith("teacher checkpoints by stage"))
    assert "12 px" in note
    assert "step-00000004" in note
    assert "step-00000008" in note
    one = teacher / "checkpoints" / "step-00000004"
    stages = f"curriculum.stages=[{{resolution: 12, teacher: '{one}'}},{{resolution: 16}}]"
    _, events = run(student_yaml, stages, "curriculum.epochs=1", name="explicit")
    assert any("step-00000004" in n for n in events[0]["notes"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["teacher.view=full"],
        ["loss.kd.kind=hard", "loss.form=convex", "loss.kd.alpha=0.5"],
        ["loss.saliency.method=attention", "loss.saliency.every=2"],
        ["loss.saliency.taps=all", "loss.saliency.strict_paper=true", "loss.saliency.fraction=0.5"],
        [
            "augment.mixup=0.2",
            "augment.cutmix=1.0",
            "augment.auto_augment=0.5",
            "augment.erase=0.2",
            "optim.clip=1.0",
        ],
        [
            "student.name=vit_tiny",
            "student.options={depth: 2, embed_dim: 48, num_heads: 2}",
            "data.cache=none",
        ],
        [
            "student.name=resnet10t",
            "student.patch=null",
            "student.options={}",
            "loss.saliency.gamma=0",
            "curriculum.stages=[{resolution: 16}]",
        ],
        ["student.distilled=false", "precision=bf16", "data.subset=40"],
        [
            "student.options={global_pool: avg, class_token: false, fc_norm: false, embed_dim: 32, num_heads: 2}",
            "student.distilled=false",
            "loss.saliency.method=hirescam",
            "loss.saliency.taps=[[norm, last]]",
        ],
    ],
    ids=lambda o: o[0],
)
def test_each_way_to_train_runs(student_yaml: Path, overrides: list[str]) -> None:
    _, events = run(student_yaml, "curriculum.epochs=1", *overrides)
    assert of(events, "summary")
    assert all(np.isfinite(e["total"]) for e in of(events, "train"))


def test_fixed_resolution_and_a_student_alone(shapes: Path, tmp_path: Path) -> None:
    file = tmp_path / "ce.yaml"
    file.write_text(
        f"data: {{shards: {shapes}, batch: 64}}\nstudent: {{options: {{embed_dim: 32, depth: 2, num_heads: 2}}}}\n"
        f"fixed: {{resolution: 16, epochs: 2}}\nprecision: fp32\nout: {tmp_path}\ntrack: {{log_every: 1}}\n"
    )
    folder, events = run(file)
    assert "kd" not in of(events, "train")[0]
    assert not of(events, "transition")
    result = evaluation.evaluate(folder)
    assert set(result["accuracy"]) == {"8", "12", "16"}
    assert not result["agreement"]
    assert set(result["pointing"]) == {"8", "12", "16"}


def test_crop_mode(tmp_path: Path) -> None:
    from irkd_dist.data import render
    from irkd_dist.data.sources import open_source

    source = open_source("synthetic", None, samples={"train": 60, "test": 20}, size=16)
    render.render(source, tmp_path / "shards", render.Options((16,), mode="crop"))
    file = tmp_path / "crop.yaml"
    file.write_text(
        f"data: {{shards: {tmp_path / 'shards'}, batch: 32}}\nprecision: fp32\nout: {tmp_path}\n"
        "student: {options: {embed_dim: 32, depth: 2, num_heads: 2}}\n"
        "curriculum: {stages: [{resolution: 8}, {resolution: 12}], epochs: 1}\n"
    )
    folder, events = run(file)
    assert [e["resolution"] for e in of(events, "stage")] == [8, 12]
    assert set(evaluation.evaluate(folder)["accuracy"]) == {"8", "12"}


def test_evaluate_agrees_with_the_run_and_measures_agreement(student_yaml: Path) -> None:
    folder, events = run(student_yaml)
    result = evaluation.evaluate(folder)
    assert result["accuracy"]["16"] == pytest.approx(of(events, "summary")[0]["test_accuracy"])
    assert 0 <= result["agreement"]["16"]["mse"] < 1
    assert -1 <= result["agreement"]["16"]["correlation"] <= 1
    kept = folder / "evaluation" / "test-8-12-16-best.json"
    assert typed.parse_checked(kept.read_bytes()) == result
    evaluation.evaluate(folder, split="val", resolutions=[16])
    assert typed.parse_checked(kept.read_bytes()) == result
    assert (kept.parent / "val-16-best.json").is_file()
    bare = evaluation.evaluate(checkpoint.find(folder, "last")[0], resolutions=[12])
    assert set(bare["accuracy"]) == {"12"}
    with pytest.raises(UserError, match="was rendered at 8, 12, 16 px"):
        evaluation.evaluate(folder, resolutions=[20])


def test_wandb_offline_and_tensorboard(student_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_SILENT", "true")
    folder, _ = run(student_yaml, "track.backend=wandb", "curriculum.epochs=1")
    sent = b"".join(f.read_bytes() for f in (folder / "wandb").glob("offline-run-*/*.wandb"))
    assert b"val/map_correlation" in sent
    assert b"student.safetensors" in sent  # of the artifact
    media = [f.name for f in (folder / "wandb").glob("offline-run-*/files/media/*/**/*")]
    assert any(name.startswith("stages_") for name in media)
    assert any(name.startswith("saliency_") for name in media)
    folder, _ = run(student_yaml, "track.backend=tensorboard", "curriculum.epochs=1", name="tb")
    seen = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert "val/saliency" in seen.Tags()["images"]
    assert {"val/accuracy", "val/map_correlation", "train/gradient_ce"} <= {*seen.Tags()["scalars"]}
    assert {"stages/text_summary", "teacher/text_summary"} <= {*seen.Tags()["tensors"]}


def test_mlflow_has_metrics_panels_tables_and_the_checkpoint(student_yaml: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="pip install 'irkd_dist[mlflow]'")
    folder, events = run(student_yaml, "track.backend=mlflow", "curriculum.epochs=1", name="ml")
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    told = client.get_run((folder / "mlflow" / "run-id.txt").read_text())
    assert told.data.metrics["test/accuracy"] == pytest.approx(events[-1]["test_accuracy"])
    assert told.info.status == "FINISHED"
    names = {
        f.path
        for path in (None, "checkpoint", "images")
        for f in client.list_artifacts(told.info.run_id, path)
    }
    assert {"stages.json", "teacher.json", "checkpoint/student.safetensors"} <= names
    assert any(name.startswith("images/val_saliency") for name in names)
    assert list((folder / "mlflow" / "files").glob("*/artifacts/checkpoint/student.safetensors"))


def test_trackio_has_metrics_panels_and_tables(
    student_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="pip install 'irkd_dist[trackio]'")
    from trackio.sqlite_storage import SQLiteStorage

    _, events = run(student_yaml, "track.backend=trackio", "curriculum.epochs=1", name="tr")
    lines = SQLiteStorage.get_logs("irkd", "tr")
    merged = {key: value for line in lines for key, value in line.items()}
    assert merged["test/accuracy"] == pytest.approx(events[-1]["test_accuracy"])
    assert {"val/saliency", "stages"} <= {*merged}


def edit_manifest(folder: Path, **values: object) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def own_shapes(shapes: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(shapes, tmp_path / "own"))


def test_a_teacher_that_does_not_fit_is_refused(student_yaml: Path, own_shapes: Path) -> None:
    here = f"data.shards={own_shapes}"
    classes = json.loads((own_shapes / "manifest.json").read_text())["classes"]
    edit_manifest(own_shapes, classes=[*classes, "other"])
    with pytest.raises(UserError, match=r"trained for 10 classes, the shards in .* have 11"):
        run(student_yaml, here)
    edit_manifest(own_shapes, classes=[*classes[1:], classes[0]])
    with pytest.raises(UserError, match="its class 0 is 'disc', the shards' is 'ring'"):
        run(student_yaml, here)
    edit_manifest(own_shapes, classes=classes, mean=[0.1, 0.1, 0.1])
    with pytest.raises(UserError, match=r"teacher\.renormalize=true feeds it its own"):
        run(student_yaml, here)
    run(student_yaml, here, "teacher.renormalize=true", "curriculum.epochs=1")


def test_renormalize_gives_the_teacher_the_numbers_it_knows(student_yaml: Path, own_shapes: Path) -> None:
    _, before = run(student_yaml, "curriculum.epochs=1", name="a")
    edit_manifest(own_shapes, mean=[0.3, 0.4, 0.5], std=[0.5, 0.4, 0.3])
    own = [f"data.shards={own_shapes}", "teacher.renormalize=true", "curriculum.epochs=1"]
    _, after = run(student_yaml, *own, name="b")
    assert of(before, "teacher")[0]["accuracy"] == of(after, "teacher")[0]["accuracy"]


def test_shards_that_do_not_fit_are_refused(student_yaml: Path, own_shapes: Path) -> None:
    here = f"data.shards={own_shapes}"
    with pytest.raises(UserError, match="render again with --resolutions 8,12,16,20"):
        run(student_yaml, here, "curriculum.stages=[{resolution: 20}]")
    tar = next((own_shapes / "r12").glob("train-*.tar"))
    data = tar.read_bytes()
    tar.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    with pytest.raises(UserError, match=tar.name):
        run(student_yaml, here)
    tar.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=tar.name):
        run(student_yaml, here, "data.verify=size")
    tar.unlink()
    with pytest.raises(UserError, match=tar.name):
        run(student_yaml, here)
    edit_manifest(own_shapes, version=99)
    with pytest.raises(UserError, match="99"):
        run(student_yaml, here)
    assert not (student_yaml.parent / "run").exists()  # nothing was written


def test_a_patch_grid_that_does_not_fit(student_yaml: Path, teacher: Path) -> None:
    assert teacher.exists()
    with pytest.raises(
        UserError, match=r"curriculum.stages\[0\].resolution=18 is not a multiple of patch size 4"
    ):
        run(student_yaml, "curriculum.stages=[{resolution: 18}]")
    other = "teacher={model: {name: custom, patch: 5, weights: x}}"
    with pytest.raises(
        UserError, match=r"resolution=12 is not a multiple of patch size 5 \(teacher\); use 10 or 15"
    ):
        run(student_yaml, other)


def test_a_diverging_run_says_so(student_yaml: Path) -> None:
    with pytest.raises(UserError, match=r"lower optim.lr"):
        run(student_yaml, "optim.lr=1e30", "loss.saliency.gamma=0")


def test_a_full_view_reaches_panels_and_agreement(shapes: Path, student_yaml: Path) -> None:
    file = student_yaml.parent / "coarse.yaml"
    file.write_text(
        f"data: {{shards: {shapes}}}\nfixed: {{resolution: 16, epochs: 1}}\nprecision: fp32\nout: {file.parent}\n"
        "student: {patch: 8, options: {embed_dim: 32, depth: 3, num_heads: 2}}\n"
    )
    teacher, _ = run(file, name="coarse")
    assert set(evaluation.evaluate(teacher)["accuracy"]) == {"8", "16"}  # 12 is no multiple of 8
    with pytest.raises(UserError, match="12 is not a multiple of patch size 8"):
        evaluation.evaluate(teacher, resolutions=[12])
    folder, _ = run(student_yaml, f"teacher.run={teacher}", "teacher.view=full", "curriculum.epochs=1")
    assert panels.load(folder)[0][0][2]["teacher"].shape == (2, 2, 2)
    assert set(evaluation.evaluate(folder)["agreement"]) == {"8", "12", "16"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.options.num_heads=0"], "timm cannot create"),
        (["student.options.in_chans=1"], "cannot take images at the stage of 12 px"),
        (["student.options.num_classes=5"], "5,.*10 classes"),
        (["loss.saliency.taps=[head]"], "'head' gives .* no patch tokens and no grid"),
        (
            [
                "student.name=small_resnet",
                "student.patch=null",
                "student.options={}",
                "loss.saliency.taps=[[stages.0,blocks.1]]",
                "loss.saliency.fraction=0.5",
            ],
            "BatchNorm would take its statistics of two parts",
        ),
    ],
)
def test_a_model_that_cannot_run_is_refused_before(
    student_yaml: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(student_yaml, *overrides)
    assert not (student_yaml.parent / "run").exists()


def test_another_model_in_the_same_run_is_named_by_its_key(student_yaml: Path) -> None:
    run(student_yaml, "curriculum.epochs=1")
    with pytest.raises(UserError, match=r"student\.options\.depth: 3 -> 2"):
        run(student_yaml, "curriculum.epochs=1", "student.options.depth=2")


def test_bests_that_a_fallback_needs_stay(student_yaml: Path) -> None:
    folder, _ = run(student_yaml, "checkpoint.keep=9")
    for kept in (folder / "checkpoints").glob("step-*"):
        best = checkpoint.load_state(kept)["curriculum"]["best_checkpoint"]
        assert best is None or (folder / best / checkpoint.STATE).is_file()


def test_no_loss_that_is_not_finite_is_checkpointed(student_yaml: Path) -> None:
    with pytest.raises(
        UserError, match=r"the logits of the student are not finite on any of 13 images at 12 px"
    ):
        run(student_yaml, "optim.lr=1e30", "checkpoint.every_steps=1", "track.log_every=1000")
    kept = (student_yaml.parent / "run" / "checkpoints").glob("step-*")
    states = [checkpoint.load_state(folder) for folder in kept]
    assert all(s["skipped"] or s["step"] <= 5 for s in states)  # what is from such steps says so
    status = json.loads((student_yaml.parent / "run" / "status.json").read_text())
    assert status["state"] == "failed"


def test_wandb_without_an_account_is_one_line(student_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(student_yaml.parent / "none"))
    with pytest.raises(UserError, match=r"track\.mode=online"):
        run(student_yaml, "track.backend=wandb", "track.mode=online")


def test_events_that_are_no_mappings_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('[1]\n{"event": "start", "step": 0, "time": 1.5}\n7\n')
    assert read_events(tmp_path) == [{"event": "start", "step": 0, "time": 1.5}]


def test_a_batch_keeps_its_tokens_where_asked_and_the_rate_follows(student_yaml: Path) -> None:
    keys = ["curriculum.batch=tokens", "curriculum.lr_scaling=linear", "curriculum.epochs=1"]
    _, events = run(student_yaml, *keys)
    entered = [(e["resolution"], e["batch"], round(e["lr"] / 3e-4, 4)) for e in of(events, "stage")]
    assert entered == [(12, 57, 1.7812), (16, 32, 1.0)]  # 32 * (16 / 12)^2 = 56.9
    assert [e["steps_per_epoch"] for e in of(events, "stage")] == [2, 4]
    assert [e["lr"] for e in of(events, "train")] == pytest.approx([3e-4 * 57 / 32] * 2 + [3e-4] * 4)
    _, events = run(student_yaml, *keys[::2], "curriculum.lr_scaling=sqrt", name="sqrt")
    assert of(events, "stage")[0]["lr"] == pytest.approx(3e-4 * (57 / 32) ** 0.5)


@pytest.mark.parametrize(
    ("ends", "reasons"),
    [
        (["curriculum.minutes=1e-6"], ["its 1e-06 minutes are spent"] * 2),
        # 110 images of 9 and then 16 tokens: 990 in the first stage's epoch, 1,760 in the second's
        (["curriculum.tokens=1000"], ["its 1000 tokens are spent"] * 2),
        (["curriculum.target=0"], ["validation accuracy"] * 2),
        (
            ["curriculum.stages[0].target=0", "curriculum.min_epochs=2"],
            ["validation accuracy", "3 epochs done"],
        ),
    ],
)
def test_a_stage_ends_by_its_budget_or_target(
    student_yaml: Path, ends: list[str], reasons: list[str]
) -> None:
    _, events = run(student_yaml, "curriculum.epochs=3", "loss.saliency.gamma=0", *ends)
    told = [e["decision"]["reason"] for e in of(events, "decision") if e["decision"]["action"] != "continue"]
    assert all(t.startswith(r) for t, r in zip(told, reasons, strict=True)), told
    done = [e["stage"] for e in of(events, "evaluation")]
    assert done.count(0) == (2 if "tokens" in ends[0] or "min_epochs" in str(ends) else 1)


def test_micro_batches_give_the_same_losses(student_yaml: Path) -> None:
    _, whole = run(student_yaml, "optim.eps=1e-3")
    _, parts = run(student_yaml, "optim.eps=1e-3", "optim.accumulate=3", name="parts")
    for a, b in zip(of(whole, "train"), of(parts, "train"), strict=True):
        assert b["total"] == pytest.approx(a["total"], rel=1e-5)
        assert b["accuracy"] == a["accuracy"]


def test_batches_named_are_left_out(student_yaml: Path) -> None:
    folder, events = run(student_yaml, "data.leave_out=[2, 5]", "track.samples=true")
    assert [e["step"] for e in of(events, "train")] == [s + 1 for s in range(16) if s not in (2, 5)]
    assert set(read_samples(folder)) == set(range(16)) - {2, 5}


def test_decisions_are_events_with_all_they_decide(student_yaml: Path) -> None:
    _, events = run(student_yaml, "curriculum.epochs=1")
    first = of(events, "decision")[0]["decision"]
    assert {k: first[k] for k in ("action", "stage", "resolution", "batch", "lr", "policy", "reload")} == {
        "action": "advance", "stage": 1, "resolution": 16, "batch": 32, "lr": 3e-4, "policy": "reset", "reload": None,
    }  # fmt: skip
    assert all("seconds" in e and "agreement_s" in e for e in of(events, "stage"))


def test_evaluate_measures_the_whole_split_whatever_stages_were_judged_by(student_yaml: Path) -> None:
    folder, _ = run(student_yaml, "data.val_subset=5", "curriculum.epochs=1")
    assert evaluation.evaluate(folder, split="val")["samples"] == 13


def test_taps_without_a_map_are_named_and_refused_where_no_stage_has_any(student_yaml: Path) -> None:
    convolutional = [
        "student.name=resnet10t", "student.patch=null", "student.options={channels: [8, 8, 8, 8]}",
        "loss.saliency.taps=[[layer4, blocks.0]]", "student.distilled=false",
    ]  # fmt: skip
    with pytest.raises(
        UserError, match=r"every tap is void \(layer4 \| blocks\.0\): its map is zero; use last"
    ):
        run(student_yaml, *convolutional)
    _, events = run(student_yaml, *convolutional[:3], "loss.saliency.taps=[[layer2, blocks.0]]", name="some")
    (told, *_) = of(events, "taps")
    assert "layer2 is flat" in told["found"]
    assert not told["dead"]  # residual branches begin at zero
    assert of(events, "summary")
