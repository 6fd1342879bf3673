"Data: the cache against interruption and damage, odd folders, downloads that fail, and the real sets where they are."
import gzip
import hashlib
import io
import os
import pickle
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metanb import data
from metanb.data import DataError, ImageClasses, check, describe, fetch, folder, load

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "Each test has its own cache and an empty default place; METANB_DATA stays as it is."
    monkeypatch.setenv("METANB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def toy(fill=0, images=3):
    pixels = torch.full((4, images, 1, 8, 8), fill, dtype=torch.uint8)
    return ImageClasses(pixels, list("abcd"), torch.tensor([0, 0, 1, 1]), ["x", "y"])


def zoo(path, classes=("cat", "dog"), images=4, size=(20, 24), modes=("RGB",)):
    g = np.random.default_rng(0)
    bands = dict(L=1, LA=2, RGB=3, RGBA=4)
    for c, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for i in range(images):
            mode = modes[(c + i) % len(modes)]
            Image.fromarray(g.integers(0, 256, (*size, bands[mode]), dtype=np.uint8).squeeze()).save(path / name / f"{i}.png")
    return path


def in_new_process(code):
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# Glyphs

def test_glyphs_have_enough_classes_and_no_letter_on_two_sides():
    names = {split: set(load("glyphs", split).names) for split in data.SCRIPTS}
    assert len(names["train"]) >= 300 and all(len(n) >= 40 for n in names.values())
    assert not names["train"] & names["test"] and not names["train"] & names["validation"] and not names["validation"] & names["test"]


def test_glyph_images_of_a_class_differ_and_none_is_blank():
    c = load("glyphs", "validation")
    assert c.images.shape[1:] == (20, 1, 28, 28) and c.images.flatten(2).amax(2).min() > 128
    assert all(len(torch.unique(images, dim=0)) == 20 for images in c.images.flatten(2))


def test_glyph_shapes_are_distinct_across_splits():
    looks = np.stack([data.look(data.draw(n)) for split in data.SCRIPTS for n in load("glyphs", split).names])
    likeness = looks @ looks.T - np.eye(len(looks))
    assert likeness.max() <= 0.88 + 1e-9


@pytest.mark.parametrize("arguments, says", [(dict(split="dev"), "train, validation, test"), (dict(per_class=0), "per_class=0"),
                                             (dict(size=2), "size=2"), (dict(size="28"), "size='28'"), (dict(seed=-1), "seed=-1")])
def test_glyphs_name_a_bad_argument(arguments, says):
    with pytest.raises((ValueError, TypeError), match=says): data.glyphs(**arguments)


# Cache

def test_two_processes_build_one_cache_at_once_and_the_same_bytes(tmp_path):
    code = "import hashlib, metanb.data as d; print(hashlib.sha256(d.load('glyphs', 'test').images.numpy().tobytes()).hexdigest())"
    both = [in_new_process(code) for _ in range(2)]
    said = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0] and said[0][0] == said[1][0], said
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["glyphs-test-28.images"]
    assert torch.equal(data.read_cache(tmp_path / "cache" / "glyphs-test-28.images")[0].images, data.glyphs("test").images)


def test_many_writers_and_a_reader(tmp_path):
    "Whatever the reader opens is one writer's file, whole."
    path = tmp_path / "one.images"
    data.write_cache(path, toy())
    code = f"""
import torch, metanb.data as d
from pathlib import Path
import sys
for i in range(20):
    images = torch.full((64, 40, 1, 28, 28), int(sys.argv[1]), dtype=torch.uint8)
    d.write_cache(Path({str(path)!r}), d.ImageClasses(images, [str(k) for k in range(64)]))
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, str(n)], cwd=ROOT) for n in (7, 9)]
    seen = 0
    while any(w.poll() is None for w in writers):
        seen += len(data.read_cache(path)[0].images.unique()) == 1
    assert seen and [w.returncode for w in writers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_kill_leaves_the_old_file(tmp_path):
    path = tmp_path / "one.images"
    data.write_cache(path, toy(5), source="old")
    code = f"""
import time, metanb.data as d
from pathlib import Path
def slowly():
    while True:
        yield bytes(100_000)
        time.sleep(0.005)
print('go', flush=True)
d.replace_file(Path({str(path)!r}), slowly())
"""
    writer = in_new_process(code)
    assert writer.stdout.readline() == "go\n"
    drafts = []
    for _ in range(400):
        drafts = list(tmp_path.glob(".one.images.*.part"))
        if drafts and drafts[0].stat().st_size > 1_000_000: break
        time.sleep(0.02)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    kept, head = data.read_cache(path)
    assert drafts and head["source"] == "old" and (kept.images == 5).all()
    os.utime(drafts[0], (0, 0))
    data.write_cache(path, toy(6))
    assert [p.name for p in tmp_path.iterdir() if p.name != "xdg"] == ["one.images"]      # the old draft was swept


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "foreign"])
def test_a_damaged_cache_is_named_and_built_again(tmp_path, harm):
    place = zoo(tmp_path / "zoo")
    first = folder(place, size=16)
    path, = (tmp_path / "cache").glob("*.images")
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(dict(flip=raw, cut=raw[:-1], empty=b"", foreign=b"hello\n")[harm])
    with pytest.warns(UserWarning, match=f"{path.name} is damaged"): second = folder(place, size=16)
    assert torch.equal(first.images, second.images)
    assert torch.equal(data.read_cache(path)[0].images, first.images)


def test_a_damaged_cache_without_its_source_is_an_error(tmp_path):
    path = tmp_path / "cache" / "omniglot-test-28.images"
    data.write_cache(path, toy(), source="gone")
    assert len(load("omniglot", "test", root=tmp_path / "nowhere")) == 4          # the cache alone is enough
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match="omniglot-test-28.images is damaged.*delete it"):
        load("omniglot", "test", root=tmp_path / "nowhere")


def test_everything_survives_the_cache(tmp_path):
    c = ImageClasses(torch.randint(0, 256, (1, 7, 3, 5, 5), dtype=torch.uint8), ["face"], counts=torch.tensor([6]),
                     attributes=torch.arange(14, dtype=torch.int32).view(7, 2), attribute_names=["a", "b"])
    data.write_cache(tmp_path / "c", c, note="n")
    back, head = data.read_cache(tmp_path / "c")
    assert torch.equal(back.images, c.images) and torch.equal(back.attributes, c.attributes) and torch.equal(back.counts, c.counts)
    assert back.names == c.names and back.attribute_names == c.attribute_names and back.families is None and head["note"] == "n"
    back.images[0, 0] = 0                                                           # writable, as any tensor


def test_a_root_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.delenv("METANB_CACHE")
    place, root = zoo(tmp_path / "zoo"), tmp_path / "root"
    root.mkdir()
    (root / "cache").write_text("a file where the folder would be")                 # holds for root too, whom no mode stops
    made = folder(place, size=16, root=root)
    assert list((tmp_path / "xdg" / "metanb" / "cache").glob("*.images"))           # in the default place instead
    monkeypatch.setenv("METANB_CACHE", str(root / "cache"))
    with pytest.warns(UserWarning, match="set METANB_CACHE"): again = folder(place, size=16)
    assert torch.equal(made.images, again.images)


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write anywhere")
def test_a_read_only_root(tmp_path, monkeypatch):
    monkeypatch.delenv("METANB_CACHE")
    root = tmp_path / "root"
    root.mkdir(mode=0o555)
    load("glyphs", "validation", root=root)
    assert list(root.iterdir()) == [] and list((tmp_path / "xdg" / "metanb" / "cache").glob("glyphs*"))


def test_the_cache_follows_its_source(tmp_path):
    place = zoo(tmp_path / "zoo")
    assert folder(place, size=16).images.shape[1] == 4
    (place / "cat" / "9.png").write_bytes((place / "cat" / "0.png").read_bytes())
    assert folder(place, size=16).counts.tolist() == [5, 4]
    Image.new("RGB", (24, 20), "red").save(place / "dog" / "0.png")                 # the same name, other pixels
    assert folder(place, size=16).images[1, 0, 0].min() == 255
    assert folder(place, size=16, colour=False).images.shape[2] == 1                # other options, another file


# Folders

def test_odd_images(tmp_path):
    place = zoo(tmp_path / "zoo", modes=("L", "RGBA", "LA", "RGB"))
    Image.new("P", (9, 40), 3).save(place / "cat" / "palette.gif")
    Image.fromarray(np.full((30, 30), 65535, dtype=np.uint16)).save(place / "cat" / "sixteen.png")
    Image.new("1", (50, 10), 1).save(place / "dog" / "bit.PNG")
    (place / "dog" / "notes.txt").write_text("no image")
    (place / ".hidden").mkdir()
    (place / "__MACOSX").mkdir()
    c = folder(place, size=16)
    assert c.names == ["cat", "dog"] and c.counts.tolist() == [6, 5] and c.images.shape == (2, 6, 3, 16, 16)
    assert c.images[0, 5].min() == 255 and c.images[1, 4].min() == 255 and c.images[1, 5].max() == 0


def test_grey_stays_grey_and_exif_turns(tmp_path):
    place = zoo(tmp_path / "zoo", modes=("L",))
    assert folder(place, size=16).images.shape[2] == 1 and folder(place, size=16, colour=True).images.shape[2] == 3
    upright = Image.new("L", (16, 16), 0)
    upright.paste(255, (0, 0, 16, 4))                                               # white above
    turned, exif = upright.rotate(90), Image.Exif()
    exif[0x0112] = 6                                                                # shown turned a quarter clockwise
    turned.save(place / "cat" / "0.jpg", exif=exif, quality=95)
    (place / "cat" / "0.png").unlink()
    assert folder(place, size=16).images[0, 0, 0, :3].float().mean() > 200


@pytest.mark.parametrize("harm", ["cut", "empty", "text", "flip"])
def test_a_damaged_image_is_named(tmp_path, harm):
    place = zoo(tmp_path / "zoo", size=(64, 64))
    bad = place / "dog" / "2.png"
    raw = bytearray(bad.read_bytes())
    raw[len(raw) // 2] ^= 255
    bad.write_bytes(dict(cut=raw[: len(raw) // 2], empty=b"", text=b"<html>not found</html>", flip=raw)[harm])
    with pytest.raises(DataError, match=r"dog.2\.png is damaged or no image.*delete it"): folder(place, size=16)
    assert not list((tmp_path / "cache").glob("*"))                                  # nothing half-read is kept


@pytest.mark.parametrize("make, says", [
    (lambda p: (p / "emu").mkdir(), "emu holds no images"),
    (lambda p: (p / "birds" / "emu").mkdir(parents=True), "birds.emu holds no images"),
])
def test_an_empty_class_is_named(tmp_path, make, says):
    place = zoo(tmp_path / "zoo")
    make(place)
    with pytest.raises(DataError, match=says): folder(place)


def test_a_folder_without_classes_and_no_folder(tmp_path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="holds no class folders"): folder(tmp_path / "bare")
    with pytest.raises(DataError, match="is no folder"): folder(tmp_path / "none")
    with pytest.raises(DataError, match="is no folder"): load(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="neither a folder nor one of glyphs"): load("imagenet21k")
    with pytest.raises(ValueError, match="size=-1"): folder(zoo(tmp_path / "zoo"), size=-1)


def test_families_from_nested_folders_and_split_folders(tmp_path):
    for split, families in dict(train=("Greek", "Latin"), val=("Lao",)).items():
        for family in families: zoo(tmp_path / "own" / split / family, classes=("one", "two"))
    c = load(tmp_path / "own", size=16)
    assert c.names == ["Greek/one", "Greek/two", "Latin/one", "Latin/two"]
    assert c.families.tolist() == [0, 0, 1, 1] and c.family_names == ["Greek", "Latin"]
    assert len(load(tmp_path / "own", "val", size=16)) == len(load(tmp_path / "own", "validation", size=16)) == 2
    with pytest.raises(ValueError, match="has train, validation"): load(tmp_path / "own", "test")
    assert [(r["split"], r["classes"], r["images"]) for r in check(str(tmp_path / "own"))] == [("train", 4, 16), ("validation", 2, 8)]


def test_a_class_called_train_is_a_class(tmp_path):
    assert folder(zoo(tmp_path / "vehicles", classes=("bus", "train")), size=16).names == ["bus", "train"]


def test_few_classes_are_divided_or_refused(tmp_path):
    place = zoo(tmp_path / "zoo", classes=[f"c{i}" for i in range(6)])
    parts = [folder(place, 16, split).names for split in ("train", "validation", "test")]
    assert sorted(sum(parts, [])) == [f"c{i}" for i in range(6)] and all(parts)
    with pytest.raises(ValueError, match="2 classes are too few"): folder(zoo(tmp_path / "two"), 16, "test")


# Layouts made up here

def test_torchvision_mnist_layout(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    idx = lambda a: bytes([0, 0, 8, a.ndim]) + np.array(a.shape, dtype=">i4").tobytes() + a.tobytes()
    for part, n in (("train", 50), ("t10k", 20)):
        labels = (np.arange(n) % 10).astype(np.uint8)
        pixels = np.repeat(labels, 784).reshape(n, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels))
        (raw / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))          # zipped and plain, as they come
    with pytest.warns(UserWarning, match="50 of the 60,000"): c = load("mnist", root=tmp_path)
    assert c.images.shape == (10, 5, 1, 28, 28) and all((c.images[k] == k).all() for k in range(10))
    file = raw / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte is damaged.*delete .*raw and fetch"): load("mnist", "test", root=tmp_path)


def test_torchvision_cifar_layouts(tmp_path):
    ten, hundred = tmp_path / "cifar-10-batches-py", tmp_path / "cifar-100-python"
    ten.mkdir(), hundred.mkdir()
    g = np.random.default_rng(0)
    pixels = g.integers(0, 256, (20, 3072), dtype=np.uint8)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (ten / name).write_bytes(pickle.dumps(dict(data=pixels, labels=[i % 10 for i in range(20)]), protocol=2))
    (ten / "batches.meta").write_bytes(pickle.dumps(dict(label_names=[f"k{i}" for i in range(10)]), protocol=2))
    with pytest.warns(UserWarning, match="100 of the 50,000"): c = load("cifar10", root=tmp_path)
    assert c.images.shape == (10, 10, 3, 32, 32) and (c.images[3, 0].numpy().ravel() == pixels[3]).all()
    names = sorted(n for part in data.split_list("fc100").values() for n in part)
    for name in ("train", "test"):
        (hundred / name).write_bytes(pickle.dumps(dict(data=np.repeat(pixels, 5, 0), fine_labels=list(range(100))), protocol=2))
    (hundred / "meta").write_bytes(pickle.dumps(dict(fine_label_names=names), protocol=2))
    with pytest.warns(UserWarning): c = load("fc100", "test", root=tmp_path)
    assert len(c) == 20 and c.images.shape[1] == 2 and sorted(c.family_names) == sorted({*data.split_list("fc100")["test"].values()})
    (ten / "data_batch_3").write_bytes((ten / "data_batch_3").read_bytes()[:900])
    with pytest.raises(DataError, match="data_batch_3 is damaged.*delete .*cifar-10-batches-py"): load("cifar10", root=tmp_path)


def test_a_pickle_may_not_run_code(tmp_path):
    class Evil:
        def __reduce__(self): return (os.mkdir, (str(tmp_path / "harm"),))
    (tmp_path / "evil").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="it asks for posix.mkdir|it asks for nt.mkdir"): data.read_pickle(tmp_path / "evil")
    assert not (tmp_path / "harm").exists()


def test_original_tiny_imagenet_layout(tmp_path):
    home, names = tmp_path / "tiny-imagenet-200", [f"n{i:08}" for i in range(200)]
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "blue").save(picture, "JPEG")
    (home / "val" / "images").mkdir(parents=True)
    for i, name in enumerate(names):
        (home / "train" / name / "images").mkdir(parents=True)
        (home / "train" / name / "images" / f"{name}_0.JPEG").write_bytes(picture.getvalue())
        (home / "val" / "images" / f"val_{i}.JPEG").write_bytes(picture.getvalue())
    (home / "val" / "val_annotations.txt").write_text("".join(f"val_{i}.JPEG\t{name}\t0\t0\t62\t62\n" for i, name in enumerate(names)))
    with pytest.warns(UserWarning, match="200 of the"):
        train, val = load("tinyimagenet", root=tmp_path), load("tinyimagenet", "val", root=tmp_path)
    assert train.names == val.names == names and train.images.shape == (200, 1, 3, 64, 64)
    with pytest.raises(DataError, match="holds no test part"): load("tinyimagenet", "test", root=tmp_path)
    (home / "val" / "images" / "val_7.JPEG").unlink()
    with pytest.raises(DataError, match="val_7.JPEG"): load("tinyimagenet", "val", root=tmp_path)


def test_mini_imagenet_in_one_folder_of_images(tmp_path):
    place = tmp_path / "mini-imagenet" / "images"
    place.mkdir(parents=True)
    names = [n for part in data.split_list("miniimagenet").values() for n in part]
    for name in names: Image.new("RGB", (12, 8)).save(place / f"{name}00000001.jpg")
    with pytest.warns(UserWarning, match="20 of the 12,000"): c = load("miniimagenet", "test", size=8, root=tmp_path)
    assert c.names == list(data.split_list("miniimagenet")["test"])
    (place / f"{c.names[0]}00000001.jpg").unlink()
    with pytest.raises(DataError, match=f"lacks 1 of the 20 test classes .{c.names[0]}"):
        load("miniimagenet", "test", size=8, root=tmp_path)


def test_celeba_with_a_table_cut_short(tmp_path):
    place = tmp_path / "celeba" / "img_align_celeba"
    place.mkdir(parents=True)
    for n in (1, 2, 3): Image.new("RGB", (178, 218)).save(place / f"{n:06}.jpg")
    table = place.parent / "list_attr_celeba.txt"
    table.write_text("3\nSmiling Young\n000001.jpg  1 -1\n000002.jpg -1 -1\n000003.jpg  1  1\n")
    with pytest.warns(UserWarning, match="3 of the 162,770"): c = load("celeba", root=tmp_path)
    assert c.images.shape == (1, 3, 3, 64, 64)
    assert c.attributes.tolist() == [[1, 0], [0, 0], [1, 1]] and c.attribute_names == ["Smiling", "Young"]
    table.write_text(table.read_text()[:-6])
    with pytest.raises(DataError, match="no full row for 000003.jpg"): load("celeba", root=tmp_path)
    with pytest.raises(DataError, match="holds no test part of CelebA, only train"): load("celeba", "test", root=tmp_path)


# Fetching

def test_absent_data_says_how_to_get_it(tmp_path):
    with pytest.raises(DataError, match="Omniglot is not under .*looked for omniglot-py.*metanb data fetch omniglot"):
        load("omniglot", root=tmp_path)
    with pytest.raises(DataError, match="is not under"): load("omniglot", root=tmp_path, cache=False)


@pytest.mark.parametrize("name, kind, calls", [("omniglot", "Omniglot", 2), ("mnist", "MNIST", 1), ("cifar10", "CIFAR10", 1),
                                               ("fc100", "CIFAR100", 1), ("celeba", "CelebA", 1)])
def test_torchvision_is_asked_and_its_failure_told(tmp_path, monkeypatch, name, kind, calls):
    import torchvision
    asked = []
    def stand_in(root, download, **options): asked.append((root, options))
    monkeypatch.setattr(torchvision.datasets, kind, stand_in)
    with pytest.raises(DataError, match="fetched but is not whole"): fetch(name, tmp_path)          # it wrote nothing
    assert len(asked) == calls and {root for root, _ in asked} == {str(tmp_path)}
    def offline(root, download, **options): raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>\nmore")
    monkeypatch.setattr(torchvision.datasets, kind, offline)
    with pytest.raises(DataError, match="could not be fetched .*name resolution.*run this again") as e:
        load(name, root=tmp_path, download=True)
    assert "\n" not in str(e.value)


def test_the_torchvision_classes_take_these_options():
    import inspect
    import torchvision
    for kind, options in dict(Omniglot=["background"], MNIST=[], CIFAR10=[], CIFAR100=[], CelebA=["split"]).items():
        assert {"root", "download", *options} <= set(inspect.signature(getattr(torchvision.datasets, kind).__init__).parameters)


class Rows(list):
    def cast_column(self, *_): return self


def hub(monkeypatch, classes, images=600, fail_at=None):
    "A stand-in for the `datasets` package: each class with 500 rows in train and 100 in validation."
    picture = io.BytesIO()
    Image.new("RGB", (9, 9), "green").save(picture, "JPEG")
    def load_dataset(repo, split):
        n = images * 5 // 6 if split == "train" else images // 6
        if split == fail_at: raise ConnectionError("Couldn't reach the Hub")
        rows = Rows(dict(label=c, image=dict(bytes=picture.getvalue(), path=None)) for c in range(len(classes)) for _ in range(n))
        rows.features = dict(label=types.SimpleNamespace(names=classes))
        return rows
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, Image=lambda decode: None))


def test_hub_fetch_sorts_classes_by_the_split_list(tmp_path, monkeypatch):
    names = sorted(n for part in data.split_list("miniimagenet").values() for n in part)
    source = data.SOURCES["miniimagenet"]
    monkeypatch.setitem(data.SOURCES, "miniimagenet", replace(source, splits={s: (c, c * 6) for s, (c, _) in source.splits.items()}))
    hub(monkeypatch, names, images=6, fail_at="validation")
    with pytest.raises(DataError, match="could not be fetched"): fetch("miniimagenet", tmp_path)
    assert not (tmp_path / "miniimagenet").exists()                                  # only the .part is there, and is replaced
    hub(monkeypatch, names, images=6)
    assert fetch("mini-ImageNet", tmp_path) == tmp_path / "miniimagenet"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["miniimagenet"]
    assert {r["split"]: r["classes"] for r in check("miniimagenet", tmp_path)} == dict(train=64, validation=16, test=20, all=100)
    hub(monkeypatch, names, fail_at="train")
    fetch("miniimagenet", tmp_path)                                                  # whole already: nothing is asked


def test_hub_without_datasets_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install metanb\[hub\]"): fetch("tinyimagenet", tmp_path)


def test_check_reports_each_split(tmp_path):
    rows = check("omniglot", tmp_path)
    assert len(rows) == 6 and all("is not under" in r["problem"] for r in rows)
    assert {r["name"]: r["ready"] for r in describe(root=tmp_path)} == {n: n == "glyphs" for n in data.SOURCES}


def test_nothing_slow_is_imported():
    code = "import sys, metanb.data; print([m for m in ('torchvision', 'datasets', 'matplotlib') if m in sys.modules])"
    assert in_new_process(code).communicate()[0].strip() == "[]"


# The real sets

def real(name):
    row, = describe(name)
    if not row["ready"]: pytest.skip(f"METANB_DATA has no {row['title']}: {row['get']}")
    return partial(load, name, progress=False)


def test_omniglot_whole():
    one, home = real("omniglot")("test"), Path(describe("omniglot")[0]["found"])
    assert len(one) == 423 and one.images.shape[1:] == (20, 1, 28, 28) and one.counts is None and len(one.families.unique()) == 13
    assert 0.05 < one.images.float().mean() / 255 < 0.12                             # ink is light, and little
    assert data.faults(data.SOURCES["omniglot"]) == ""                               # all six splits have all their files
    folders = [half / one.names[0] for half in home.iterdir() if (half / one.names[0]).is_dir()]
    plain = 255 - np.asarray(Image.open(sorted(folders[0].glob("*.png"))[4]).convert("L"))
    assert (np.asarray(Image.fromarray(plain).resize((28, 28), Image.Resampling.LANCZOS)) == one.images[0, 4, 0].numpy()).all()


def test_an_interrupted_omniglot_is_named(tmp_path):
    real("omniglot")
    home = Path(describe("omniglot")[0]["found"])
    copy = tmp_path / "root" / "omniglot-py"
    for half in ("images_background", "images_evaluation"):
        (copy / half).mkdir(parents=True)
        for alphabet in (home / half).iterdir():
            if alphabet.is_dir(): (copy / half / alphabet.name).symlink_to(alphabet)
    assert len(load("omniglot", "test", root=tmp_path / "root", progress=False)) == 423              # links are followed
    victim = load("omniglot", "test", root=tmp_path / "root").names[0].split("/")[0]
    half = next(h for h in copy.iterdir() if (h / victim).exists())
    (half / victim).unlink()
    with pytest.raises(DataError, match=f"lacks .* test classes .{victim}.*delete .*omniglot-py and run"):
        load("omniglot", "test", root=tmp_path / "root")


@pytest.mark.parametrize("name, split, classes, shape", [
    ("miniimagenet", "validation", 16, (3, 84, 84)), ("cifarfs", "test", 20, (3, 32, 32)), ("fc100", "validation", 20, (3, 32, 32)),
    ("cifar10", "test", 10, (3, 32, 32)), ("tinyimagenet", "validation", 200, (3, 64, 64))])
@pytest.mark.filterwarnings("ignore:this copy")
def test_photographs(name, split, classes, shape):
    c = real(name)(split)
    assert len(c) == classes == len(set(c.names)) and c.images.shape[2:] == shape and 0.3 < c.images.float().mean() / 255 < 0.6
    if name == "fc100": assert len(c.families.unique()) == 4 and c.images.shape[1] == 600


def test_mnist_whole():
    c = real("mnist")("test")
    images, labels = data.labelled(c)
    assert len(images) == 10_000 and c.counts[1] == 1135 and c.counts[5] == 892 and torch.equal(labels.bincount(), c.counts)
    assert data.faults(data.SOURCES["mnist"]) == ""


@pytest.mark.filterwarnings("ignore:this copy")
def test_celeba_and_its_attributes():
    c = real("celeba")("train")
    assert len(c) == 1 and c.images.shape[2:] == (3, 64, 64) and c.attributes.shape[0] == c.images.shape[1]
    assert len(c.attribute_names) >= 40 and 0.4 < c.attributes[:, c.attribute_names.index("Smiling")].float().mean() < 0.6
