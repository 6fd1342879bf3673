"The command line as users meet it: in processes of its own, with Ctrl-C, kills, wrong words, foreign files and folders of images."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from metanb import cli
from metanb.data import seal
from metanb.dimaml import load_init
from metanb.lstm import LearnedOptimizer, load_rule
from metanb.models import MLP
from metanb.train import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SINES = ["--tasks", "sinusoid", "--scale", "smoke", "--device", "cpu"]
RUNS = ["--tasks", "train-glyphs", *SINES[2:]]


def metanb(*words, cwd, wait=True, **env):
    "Runs `metanb` in a process of its own, in its own session."
    process = subprocess.Popen([sys.executable, "-m", "metanb", *map(str, words)], cwd=cwd, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT), **env})
    if not wait: return process
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def torchrun(*words, cwd, processes=2, wait=True):
    "Runs `metanb` in several processes that work together."
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "metanb"]
    process = subprocess.Popen([*launch, *map(str, words)], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    if not wait: return process
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def refused(capsys, *words):
    "The single line with which `main` refuses."
    try: status = cli.main(list(map(str, words)))
    except SystemExit as stop: status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "", (status, out)
    assert err.startswith("metanb: error: ") and err.count("\n") == 1, err
    return err


def until(happens, seconds=120):
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def session(leader):
    "Processes of the session that `leader` started, which aren't zombies."
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try: fields = stat.read_text().rpartition(")")[2].split()
        except OSError: continue
        if int(fields[3]) == leader and fields[0] != "Z": found.append(int(stat.parent.name))
    return found


def test_compare_prints_a_table_and_writes_a_picture(tmp_path):
    status, out, err = metanb("compare", *SINES, "--methods", "maml,fromscratch", "--processes", 2, cwd=tmp_path)
    assert status == 0, err
    assert out.count(" ± ") >= 6 and "MAML" in out and max(map(len, out.splitlines())) <= 100
    assert "1 of 2" in err and "2 of 2" in err
    picture = Image.open(tmp_path / "metanb-compare" / "compare.png")
    assert picture.size == (1500, 600)
    loaded = cli.load_results(tmp_path / "metanb-compare")
    assert repr(loaded) in out
    alone = cli.compare(["maml", "fromscratch"], ["sinusoid"], scale="smoke", device="cpu", progress=False)
    strip = lambda row: {k: v for k, v in row.items() if k not in ("train_seconds", "ms_per_step", "adapt_ms")}
    for a, b in zip(loaded.data["rows"], alone.data["rows"]):
        assert strip(a).keys() == strip(b).keys()
        assert a["mean"] == pytest.approx(b["mean"], rel=1e-3) and a["ci95"] == pytest.approx(b["ci95"], rel=1e-3)


def test_a_terminal_without_plus_minus(tmp_path):
    run = "compare", *SINES, "--methods", "fromscratch", "--no-progress", "--processes", 1
    status, out, err = metanb(*run, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert status == 0 and err == "" and " ? " in out


def test_precision_is_recorded(capsys, tmp_path):
    run = ["compare", *SINES, "--methods", "maml", "--processes", "1", "--no-progress", "--precision", "bf16", "--out", str(tmp_path)]
    assert cli.main(run) == 0 and "CPU, bf16 · seed 0" in capsys.readouterr().out
    assert cli.load_results(tmp_path).data["precision"] == "bf16"
    train = ["train", *SINES, "--steps", "1", "--no-progress", "--precision", "bf16", "--checkpoint", tmp_path / "half"]
    assert cli.main(list(map(str, train))) == 0 and cli.read_record(tmp_path / "half")[0].precision == "bf16"
    capsys.readouterr()
    assert "precision 'float32': " in refused(capsys, *train[:-4], "--resume", "--precision", "float32", "--checkpoint", tmp_path / "half")


def test_several_seeds(capsys, tmp_path):
    run = ["compare", *SINES, "--methods", "maml", "--seeds", "0", "1", "2", "--processes", "1", "--no-progress"]
    assert cli.main([*run, "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "seed 0, 1, 2" in out and out.count("\nMAML") == 1 and err == ""
    rows = cli.load_results(tmp_path).data["rows"]
    assert [r["seed"] for r in rows] == [0, 1, 2] and rows[0]["mean"] != rows[1]["mean"]


def test_results_replace_results_and_nothing_else(capsys, tmp_path):
    run = ["compare", *SINES, "--methods", "fromscratch", "--processes", "1", "--no-progress", "--out", tmp_path]
    for _ in range(2): assert cli.main(list(map(str, run))) == 0
    capsys.readouterr()
    (tmp_path / "results.json").write_text('{"mine": 1}')
    assert "no results file" in refused(capsys, *run)
    (tmp_path / "results.json").unlink()
    assert "isn't from here" in refused(capsys, *run)
    assert "is a file" in refused(capsys, *run[:-1], tmp_path / "compare.png")


@pytest.mark.parametrize("words, says", [
    (["compare", "--methods", "mamml"], "did you mean maml?"),
    (["compare", "--methods"], "--methods"),
    (["compare", "--tasks", "glyph"], "did you mean glyphs?"),
    (["compare", "--ways", "one"], "'one' is no whole number of 2 or more"),
    (["compare", "--scale", "huge"], "--scale"),
    (["compare", "--device", "toaster"], "'toaster'"),
    (["compare", "--tasks", "folder:/no/such/place"], "no folder"),
    (["train", "--method", "fromscratch", "--checkpoint", "never"], "nothing to train"),
    (["train", "--resume", "--checkpoint", "never"], "there is no checkpoint never"),
    (["evaluate"], "--checkpoint"),
    (["evaluate", "--checkpoint", "never"], "there is no checkpoint never"),
    (["bench", "--problems", "imagenet"], "problems='imagenet': use sinusoid, omniglot"),
    (["bench", "--implementations", "loop,lop"], "implementations='lop'"),
    (["bench", "--vary", "ways"], "sine curves have no classes"),
    (["bench", "--seconds", "0"], "'0' is no number above zero"),
    (["data", "fetch", "imagenet"], "neither a folder nor one of"),
    (["data", "check", "/no/such/place"], "metanb: error"),
    (["data"], "ACTION"),
    ([], "COMMAND"),
])
def test_wrong_words_get_one_line(capsys, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_a_wrong_scale_in_the_environment(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("METANB_SCALE", "tiny")
    assert "scale 'tiny'" in refused(capsys, "compare", "--out", tmp_path)


def test_a_missing_data_set_says_how_to_get_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("METANB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("METANB_CACHE", str(tmp_path / "cache"))
    run = "compare", "--tasks", "omniglot", "--scale", "smoke", "--device", "cpu", "--processes", 1, "--no-progress"
    line = refused(capsys, *run, "--out", tmp_path / "out")
    assert "metanb data fetch omniglot" in line


def test_bugs_keep_their_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "run_trials", lambda *args: [][0])
    with pytest.raises(IndexError): cli.main(["compare", *SINES, "--out", str(tmp_path)])


def image_folder(place, classes, images, size=20):
    for c in range(classes):
        (place / f"c{c:02}").mkdir(parents=True)
        for i in range(images):
            pixels = (torch.rand(size, size, 3, generator=torch.Generator().manual_seed(100 * c + i)) * 255).byte().numpy()
            Image.fromarray(pixels).save(place / f"c{c:02}" / f"{i}.png")
    return place


def test_a_folder_of_images(capsys, tmp_path):
    place = image_folder(tmp_path / "pets", classes=20, images=4)
    run = ["--tasks", f"folder:{place}", "--ways", "3", "--scale", "smoke", "--device", "cpu", "--no-progress"]
    assert cli.main(["compare", *run, "--methods", "maml", "pretrained", "--processes", "1", "--out", str(tmp_path / "out")]) == 0
    assert "pets, 3-way 1-shot" in capsys.readouterr().out
    few = image_folder(tmp_path / "few", classes=6, images=4)
    run = "compare", "--tasks", f"folder:{few}", *SINES[2:], "--processes", 1, "--no-progress"
    assert "ways=5" in refused(capsys, *run, "--out", tmp_path / "out")


def test_train_evaluate_and_resume(capsys, tmp_path):
    path = tmp_path / "a" / "maml.checkpoint"
    assert cli.main(["train", *SINES, "--checkpoint", str(path), "--steps", "10"]) == 0
    assert capsys.readouterr().err.count("validation MSE") == 10
    assert cli.main(["evaluate", "--checkpoint", str(path), "--test-tasks", "10", "--steps", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count(" ± ") == 4
    assert cli.main(["evaluate", "--checkpoint", f"{path}.best", "--test-tasks", "10", "--shots", "5", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert "already" in refused(capsys, "train", *SINES, "--checkpoint", path)
    assert "was made with 5" in refused(capsys, "train", "--resume", "--checkpoint", path, "--ways", "7")
    assert cli.main(["train", "--resume", "--checkpoint", str(path), "--steps", "12", "--device", "cpu", "--no-progress"]) == 0
    assert "12 meta-steps" in capsys.readouterr().out
    record = Path(f"{path}.json")
    text = record.read_text()
    for bad in (text[:30], "[]", text.replace("metanb learner 1", "else"), text.replace('"method"', '"methode"')):
        record.write_text(bad)
        assert str(record) in refused(capsys, "evaluate", "--checkpoint", path)
    record.unlink()
    assert "is missing" in refused(capsys, "evaluate", "--checkpoint", path)


@pytest.mark.parametrize("method, tasks", [*((m, "glyphs") for m in ("protonet", "incontext", "mtl", "imaml", "maml-meta-pcgrad")),
                                           ("lstm", "train-glyphs"), ("dimaml", "train-glyphs")])
def test_every_kind_of_learner_is_trained_resumed_and_tested(capsys, tmp_path, method, tasks):
    path, problem = tmp_path / "half.checkpoint", ["--tasks", tasks, "--scale", "smoke", "--device", "cpu", "--no-progress"]
    whole = cli.train(progress=False, method=method, tasks=tasks, scale="smoke", device="cpu", steps=4)[0].state_dict()
    assert cli.main(["train", "--method", method, *problem, "--checkpoint", str(path), "--steps", "2"]) == 0
    assert cli.main(["train", "--resume", "--checkpoint", str(path), "--steps", "4", "--device", "cpu", "--no-progress"]) == 0
    saved = load_checkpoint(path)["learner"]
    same = [n for n, t in whole.items() if torch.equal(saved[n], t)]
    assert saved.keys() == whole.keys() and (method == "mtl" or len(same) == len(whole))  # MTL's pretraining is as long as first asked for
    capsys.readouterr()
    assert cli.main(["evaluate", "--checkpoint", str(path), "--test-tasks", "10", "--device", "cpu"]) == 0
    assert " ± " in capsys.readouterr().out


def test_trained_rules_and_distributions_go_into_files_of_their_own(capsys, tmp_path):
    model = torch.nn.Sequential(torch.nn.Flatten(), MLP(14 * 14, 20, 26, activation=torch.nn.Sigmoid, std=None))
    words = ["train", "--tasks", "train-glyphs", "--scale", "smoke", "--device", "cpu", "--no-progress", "--steps", "1"]
    for method in ("lstm", "dimaml"):
        place = ["--checkpoint", str(tmp_path / f"{method}.checkpoint"), "--export", str(tmp_path / method)]
        assert cli.main([*words, "--method", method, *place]) == 0
    before, opt = [p.detach().clone() for p in model.parameters()], LearnedOptimizer(model.parameters(), load_rule(tmp_path / "lstm"))
    model(torch.randn(4, 1, 14, 14)).square().mean().backward()
    opt.step()
    assert all(not torch.equal(p, q) for p, q in zip(before, model.parameters()))
    assert load_init(tmp_path / "dimaml", model).fill(model) is model
    capsys.readouterr()
    maml = ["train", "--method", "maml", *SINES, "--checkpoint", tmp_path / "maml", "--export", tmp_path / "rule"]
    assert "learns neither a rule nor a distribution" in refused(capsys, *maml) and not (tmp_path / "maml").exists()


def test_methods_that_do_not_apply_are_left_out_of_mixed_tasks(capsys, tmp_path):
    out = tmp_path / "results"
    run = ["compare", "--methods", "mtl,protonet,maml", "--scale", "smoke", "--device", "cpu", "--processes", "1"]
    assert cli.main([*run, "--out", str(out)]) == 0
    table, err = capsys.readouterr()
    assert "left out, for it does not apply: MTL on sinusoid, ProtoNet on sinusoid" in err
    assert table.count("MAML") == 2 and table.count("ProtoNet") == table.count("MTL") == 1


@pytest.mark.parametrize("method, tasks", [("maml", SINES), ("maml-meta-pcgrad", SINES), ("lstm", RUNS), ("hierarchical", RUNS)])
def test_two_processes_train_as_one_does(capsys, tmp_path, method, tasks):
    weights = lambda name: load_checkpoint(tmp_path / name)["learner"]
    one = lambda *words, name: cli.main(["train", *words, "--device", "cpu", "--no-progress", "--checkpoint", str(tmp_path / name)])
    train = "--method", method, *tasks[:-2], "--steps"
    status, out, err = torchrun("train", *train, 4, "--device", "cpu", "--checkpoint", "two", cwd=tmp_path)
    assert status == 0, err
    assert out == "4 meta-steps; try it: metanb evaluate --checkpoint two\n" and err.count("   validation ") == 4
    assert one(*train, "4", name="one") == 0
    torch.testing.assert_close(weights("two"), weights("one"), rtol=1e-4, atol=1e-6)
    assert one("--resume", "--steps", "6", name="two") == one("--resume", "--steps", "6", name="one") == 0
    torch.testing.assert_close(weights("two"), weights("one"), rtol=1e-4, atol=1e-6)


def test_several_processes_that_are_told_to_end_save_first(tmp_path):
    process = torchrun("train", *SINES, "--steps", 4000, "--no-progress", "--checkpoint", "told", cwd=tmp_path, wait=False)
    until(lambda: (tmp_path / "told.best").exists())  # the first validation, after 200 steps
    process.send_signal(signal.SIGTERM)  # as a scheduler does before the time is over
    _, err = process.communicate(timeout=120)
    if process.returncode == 0: pytest.skip("it was done before the signal came")
    assert 200 <= load_checkpoint(tmp_path / "told")["step"] < 4000
    assert "saved told at step" in err, err


def test_what_torchrun_starts_again_goes_on(capsys, monkeypatch, tmp_path):
    run = ["train", *SINES, "--no-progress", "--checkpoint", str(tmp_path / "c"), "--steps"]
    assert cli.main([*run, "2"]) == 0
    capsys.readouterr()
    assert "is there already" in refused(capsys, *run, 4)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert cli.main([*run, "4"]) == 0 and load_checkpoint(tmp_path / "c")["step"] == 4
    assert cli.main([*run[:-2], str(tmp_path / "new"), "--steps", "2"]) == 0  # it failed before there was a checkpoint


def test_of_several_processes_one_refuses(tmp_path):
    status, out, err = torchrun("train", *SINES, "--method", "mamml", cwd=tmp_path)
    assert status != 0 and out == "" and err.count("metanb: error: ") == 1 and "did you mean maml?" in err and "metanb, process" not in err
    assert not list(tmp_path.iterdir())


def test_what_all_processes_would_say_only_the_first_says(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "compare runs in one process" in refused(capsys, "compare")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["compare"]) == 2
    with pytest.raises(SystemExit): cli.main(["train", "--steps", "few"])
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("metanb.compute.processes", lambda: 2)
    monkeypatch.setattr("metanb.compute.rank", lambda: 1)
    for method in ("lstm", "dimaml"):
        with pytest.raises(cli.Refused, match="tasks=1: 2 processes need"): cli.check_split(cli.Trial(method, "train-glyphs"))


def test_bench_writes_what_it_measured_and_fails_where_gradients_disagree(capsys, monkeypatch, tmp_path):
    from metanb import bench
    run = ["bench", "--implementations", "loop", "metanb-loop", "--seconds", "0.02", "--repeats", "1", "--threads", "1", "--device", "cpu",
           "--no-progress", "--out", str(tmp_path / "out")]
    assert cli.main(run) == 0
    result, (out, _) = bench.load_bench(tmp_path / "out" / "bench.json"), capsys.readouterr()
    assert repr(result) in out and [r.implementation for r in result.rows] == ["loop", "metanb-loop"] and not result.refused
    assert Image.open(tmp_path / "out" / "bench.png").size[0] > 500
    strict = bench.IMPLEMENTATIONS["metanb-loop"]._replace(tolerance=-1.0)  # no difference is as small as that
    monkeypatch.setitem(bench.IMPLEMENTATIONS, "metanb-loop", strict)
    assert cli.main(run) == 1
    assert "metanb: error: metanb-loop on sinusoid: gradients disagree" in capsys.readouterr().err
    assert [r.implementation for r in bench.load_bench(tmp_path / "out" / "bench.json").refused] == ["metanb-loop"]
    (tmp_path / "out" / "bench.json").write_text("{}")
    assert "no result of a benchmark" in refused(capsys, *run)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_ctrl_c_in_training_saves_and_resume_ends_where_it_would_have(tmp_path):
    train = ["train", *SINES, "--steps", 400, "--no-progress"]
    process = metanb(*train, "--checkpoint", "stopped", cwd=tmp_path, wait=False)
    until(lambda: (tmp_path / "stopped.best").exists())  # the first validation, after 20 steps
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    if process.returncode == 0: pytest.skip("it was done before the signal came")
    assert process.returncode == 130, err
    assert "metanb: stopped after meta-step" in err and "saved stopped at step" in err and "Traceback" not in err
    assert metanb("train", "--resume", "--checkpoint", "stopped", "--device", "cpu", "--no-progress", cwd=tmp_path)[0] == 0
    assert metanb(*train, "--checkpoint", "straight", cwd=tmp_path)[0] == 0
    stopped, straight = (load_checkpoint(tmp_path / name)["learner"] for name in ("stopped", "straight"))
    for name in straight: assert torch.equal(stopped[name], straight[name])


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("how, status", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_comparison_that_is_stopped_leaves_no_process(tmp_path, how, status):
    process = metanb("compare", *SINES, "--methods", "maml", "fomaml", "--steps", 10**7, "--processes", 2, cwd=tmp_path, wait=False)
    until(lambda: len(session(process.pid)) >= 4)  # itself, two workers, and what keeps count of shared resources
    time.sleep(2)
    process.send_signal(how) if how == signal.SIGKILL else os.killpg(process.pid, how)  # a terminal sends Ctrl-C to all of them
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    if how == signal.SIGINT: assert err.strip().endswith("metanb: stopped") and "Traceback" not in err
    until(lambda: not session(process.pid), 60)


def test_data_list_says_where_and_how(capsys, tmp_path):
    assert cli.main(["data", "list", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path) in out and "omniglot" in out and "not here" in out and "built in" in out


def test_data_check_of_a_folder(capsys, tmp_path):
    place = image_folder(tmp_path / "pets", classes=3, images=2)
    assert cli.main(["data", "check", str(place)]) == 0
    assert "3 classes, 6 images" in capsys.readouterr().out
    damaged = place / "c01" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    assert str(damaged) in refused(capsys, "data", "check", place)
    whole = image_folder(tmp_path / "sets" / "train", 2, 2), image_folder(tmp_path / "sets" / "test", 2, 2)
    (whole[0] / "c00" / "0.png").write_bytes(b"")
    assert cli.main(["data", "check", str(tmp_path / "sets")]) == 2
    out, err = capsys.readouterr()
    assert "PROBLEM" in out and "2 classes, 4 images" in out and "is not whole" in err


def test_results_are_plain_json(tmp_path):
    results = cli.compare(["maml"], ["sinusoid"], scale="smoke", device="cpu", progress=False)
    document, picture = results.save(tmp_path)
    data = json.loads(document.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert data == seal(results.data) and set(data) >= {"format", "made", "versions", "device", "scale", "seeds", "problems", "rows"}
    data["rows"][0]["mean"][-1] = None  # a run that diverged
    assert "diverged" in repr(cli.Results(data)) and cli.plot_results(data) is not None
