"""Scores of images that exist already: every input gives the same bits, bad input is one clear line."""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from support import request, run_serial, small_suite

from evalbench import images_in
from evalbench.errors import EvalbenchError, UserError
from evalbench.export import export_run
from evalbench.images_in import Seen, blocks, open_source
from evalbench.metrics.frechet import pack_statistics
from evalbench.models.references import make as shipped
from evalbench.reference_files import (
    make_command,
    make_reference,
    of_images,
    read_reference,
    show_command,
    verify_command,
    verify_reference,
)
from evalbench.registry import extractor_fingerprint
from evalbench.sample_plan import read_plan
from evalbench.score import score_command, score_images

N = 40
METRICS = ("fd@fashion64", "kid@fashion64", "precision@fashion64", "recall@fashion64")
DRAWS = shipped.FOLDER / "fashion-mixture-draws.fashion64.safetensors"


def pictures(n=N, seed=0, shape=(32, 32, 1)):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def png(image, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(stream, kind, **options)
    return stream.getvalue()


def folder_of(path, images, names=None):
    for i, image in enumerate(images):
        file = path / (names[i] if names else f"{i // 10}/{i:03d}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(image))
    return path


def zip_of(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def npz_of(path, compressed=False, **arrays):
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def pixels(source, size=16):
    seen = Seen()
    read = list(blocks(open_source(source), seen, size))
    assert {len(block.ids) for block in read[:-1]} <= {size}
    return np.concatenate([block.images.numpy() for block in read]), seen


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One set of images in every form that can be read."""
    tmp, images = tmp_path_factory.mktemp("sources"), pictures()
    return {
        "folder": folder_of(tmp / "folder", images),
        "zip": zip_of(tmp / "a.zip", reversed([(f"{i // 10}/{i:03d}.png", png(x)) for i, x in enumerate(images)])),
        "npz": npz_of(tmp / "a.npz", arr_0=images),
        "compressed npz": npz_of(tmp / "b.npz", compressed=True, arr_0=images),
        "arrays": list(images),
        "grey arrays": list(images[..., 0]),
        "tensors": torch.from_numpy(images).permute(0, 3, 1, 2),
        "generator": lambda: (image for image in images),
    }


@pytest.fixture(scope="module")
def from_folder(sources):
    return score_images(sources["folder"], reference=DRAWS, metrics=METRICS, allow_small_n=True)


FORMS = ("folder", "zip", "npz", "compressed npz", "arrays", "grey arrays", "tensors", "generator")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pixels_in_blocks(sources, form):
    source = sources[form]
    read, seen = pixels(source() if callable(source) else source)
    assert read.dtype == np.uint8
    assert np.array_equal(read, pictures().transpose(0, 3, 1, 2))
    assert (seen.n, seen.shape) == (N, (1, 32, 32))


@pytest.mark.parametrize("form", FORMS[1:])
def test_every_form_gives_the_same_bits(sources, form, from_folder):
    source = sources[form]
    result = score_images(
        source() if callable(source) else source, reference=DRAWS, metrics=METRICS, allow_small_n=True
    )
    assert result.scores == from_folder.scores
    assert result.protocol["source"]["pixels_sha256"] == from_folder.protocol["source"]["pixels_sha256"]


def test_blocks_are_merged_in_order(monkeypatch, sources):
    """Every number, the bias by halves of the sample index too; of samples and of a reference made on the fly."""
    real, metrics = pictures(90, seed=3), ["fd@fashion64", "sw@fashion64", "recall@fashion64"]
    whole = score_images(sources["npz"], reference=real, metrics=metrics, allow_small_n=True)
    monkeypatch.setattr(images_in, "BATCH", 16)
    cut = score_images(sources["npz"], reference=real, metrics=metrics, allow_small_n=True)
    for metric in metrics:
        for name in ("value", "se", "bias", "low", "high"):
            ours, theirs = getattr(cut[metric], name), getattr(whole[metric], name)
            assert ours == theirs if theirs is None else ours == pytest.approx(theirs, rel=1e-9)
    kept = of_images(real, "fashion64", keep=20).arrays["features"]
    assert np.array_equal(kept, of_images(real, "fashion64").arrays["features"][:20])


def test_colour_images_keep_their_channels(tmp_path):
    images = pictures(3, shape=(5, 7, 3))
    for source in (
        folder_of(tmp_path / "f", images),
        zip_of(tmp_path / "z.zip", [(f"{i}.bmp", png(x, "BMP")) for i, x in enumerate(images)]),
        zip_of(tmp_path / "w.zip", [(f"{i}.webp", png(x, "WEBP", lossless=True)) for i, x in enumerate(images)]),
        npz_of(tmp_path / "n.npz", arr_0=images),
    ):
        assert np.array_equal(pixels(source)[0], images.transpose(0, 3, 1, 2))


def test_other_names_permute_the_images_and_change_the_last_digits_only(tmp_path, from_folder):
    names = [f"{(7 * i) % N:03d}.png" for i in range(N)]
    mixed = folder_of(tmp_path / "mixed", pictures(), names)
    result = score_images(mixed, reference=DRAWS, metrics=METRICS, allow_small_n=True)
    for metric in METRICS:
        assert result[metric].value == pytest.approx(from_folder[metric].value, rel=1e-10)
    assert result["fd@fashion64"].se == pytest.approx(from_folder["fd@fashion64"].se, rel=0.1)  # halves by position
    assert result.protocol["source"]["pixels_sha256"] != from_folder.protocol["source"]["pixels_sha256"]


# --- against the runner ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run of fashion-mixture that kept its images."""
    tmp = tmp_path_factory.mktemp("run")
    suite = small_suite("fashion-mixture", samples=192, batch=64, chunk=64)
    suite = suite.model_copy(update={"solution": None})
    metrics = ("fd@fashion64", "kid@fashion64", "accuracy@fashion-classifier")
    records, _ = run_serial(request(suite, ["ddim"], metrics=metrics, save_samples=True), tmp / "run")
    return next(record for record in records if record.kind == "quality"), tmp


@pytest.mark.parametrize("layout", ["folder", "adm-npz"])
def test_equals_the_record_of_the_runner(run, layout):
    record, tmp = run
    assert record.status == "ok"
    exported, *_ = export_run(tmp / "run", layout, tmp / layout)
    labels = [i % 10 for i in range(192)]
    metrics = list(record.metrics)
    result = score_images(exported, reference=DRAWS, metrics=metrics, labels=labels, allow_small_n=True)
    assert len(metrics) == 3
    for metric in metrics:
        ours, theirs = result[metric], record.metrics[metric]
        assert ours.n == theirs.n == 192
        for name in ("value", "se", "low", "high"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-9)
    assert result.protocol["features"]["fashion64"] == extractor_fingerprint("fashion64")
    json.dumps(result.to_json(), allow_nan=False)


def test_a_changed_export_is_noticed(run):
    _, tmp = run
    exported, *_ = export_run(tmp / "run", "folder", tmp / "changed")
    (exported / "000007.png").write_bytes(png(pictures(1)[0]))
    with pytest.raises(UserError, match=r"is not what its manifest\.json says"):
        pixels(exported)
    (exported / "000008.png").unlink()
    with pytest.raises(UserError, match=r"holds 191 images, its manifest\.json says 192 \(missing: 000008\)$"):
        pixels(exported)


# --- bad input ------------------------------------------------------------------------------------------------------


def huge_png():
    """A PNG header that claims 60,000 x 60,000 pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def two(tmp, name, content):
    """A folder with one good image and a file after it."""
    folder_of(tmp, pictures(1), ["a.png"])
    (tmp / name).write_bytes(content)
    return tmp


BAD = {
    "missing": (lambda tmp: tmp / "nowhere", "'{tmp}/nowhere' not found; give a folder, a .zip or an .npz of images"),
    "other file": (lambda tmp: two(tmp, "x.csv", b"") / "x.csv", "'{tmp}/x.csv' is no folder, .zip or .npz; give one"),
    "empty folder": (lambda tmp: tmp, "folder '{tmp}' holds no images (.png, "),
    "one image": (lambda tmp: folder_of(tmp, pictures(1)), "'{tmp}' holds 1 image; a score needs at least 2"),
    "sizes": (
        lambda tmp: two(tmp, "b.png", png(pictures(1, shape=(32, 31, 1))[0])),
        "'{tmp}': b.png is 31 x 32 with 1 channel, the images before it 32 x 32 with 1 channel; give images",
    ),
    "channels": (
        lambda tmp: two(tmp, "b.png", png(pictures(1, shape=(32, 32, 3))[0])),
        "'{tmp}': b.png is 32 x 32 with 3 channels, the images before it 32 x 32 with 1 channel; give images",
    ),
    "truncated": (lambda tmp: two(tmp, "b.png", png(pictures(1)[0])[:-300]), "{tmp}/b.png is broken: "),
    "text": (lambda tmp: two(tmp, "b.png", b"no image at all"), "{tmp}/b.png is no image"),
    "alpha": (
        lambda tmp: two(tmp, "b.png", png(pictures(1, shape=(32, 32, 4))[0])),
        "{tmp}/b.png has mode RGBA; save it as 8-bit grey (L) or RGB",
    ),
    "pixel bomb": (lambda tmp: two(tmp, "b.png", huge_png()), "{tmp}/b.png has more pixels than the limit of "),
    "zip bomb": (
        lambda tmp: zip_of(tmp / "a.zip", [("a.png", png(pictures(1)[0])), ("b.png", bytes(images_in.LARGEST + 1))]),
        "'{tmp}/a.zip': b.png unpacks to 67,108,865 bytes; the limit is 67,108,864",
    ),
    "zip of text": (lambda tmp: zip_of(tmp / "a.zip", [("a.txt", b"")]), "zip '{tmp}/a.zip' holds no images"),
    "no zip": (lambda tmp: two(tmp, "a.zip", b"no zip") / "a.zip", "'{tmp}/a.zip' is no readable zip: "),
    "objects": (
        lambda tmp: npz_of(tmp / "a.npz", arr_0=np.array([{"a": 1}, None])),
        "'{tmp}/a.npz': 'arr_0' holds pickled objects, which are never loaded; save a uint8 array",
    ),
    "float": (
        lambda tmp: npz_of(tmp / "a.npz", arr_0=pictures().astype(np.float32)),
        "'{tmp}/a.npz': 'arr_0' is float32; save uint8 (",
    ),
    "channels first": (
        lambda tmp: npz_of(tmp / "a.npz", arr_0=pictures().transpose(0, 3, 1, 2).copy()),
        "'{tmp}/a.npz': 'arr_0' has shape (40, 1, 32, 32); save (N, H, W, C) in C order, C = 1 or 3",
    ),
    "fortran": (
        lambda tmp: npz_of(tmp / "a.npz", arr_0=np.asfortranarray(pictures())),
        "'{tmp}/a.npz': 'arr_0' has shape (40, 32, 32, 1) in Fortran order; save",
    ),
    "other key": (lambda tmp: npz_of(tmp / "a.npz", images=pictures()), "'{tmp}/a.npz' holds images; images stand und"),
    "npz with one": (lambda tmp: npz_of(tmp / "a.npz", arr_0=pictures(1)), "'{tmp}/a.npz' holds 1 image; a score"),
    "npz with none": (lambda tmp: npz_of(tmp / "a.npz", arr_0=pictures(0)), "'{tmp}/a.npz' holds no images; a score"),
    "floats": (lambda tmp: [np.zeros((4, 4))] * 2, "image 0 is float64; give uint8 (from [-1, 1]: "),
    "array channels first": (lambda tmp: pictures(2, shape=(3, 9, 9)), "image 0 has shape (3, 9, 9); give arrays (H"),
    "no iterable images": (lambda tmp: [], "'iterable' holds no images; a score needs at least 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_names_the_file(tmp_path, case):
    make, message = BAD[case]
    source = make(tmp_path)
    with pytest.raises(UserError, match="^" + re.escape(message.replace("{tmp}", str(tmp_path)))) as caught:
        pixels(source)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_size_that_lies_in_the_zips_index_is_noticed(tmp_path):
    file = zip_of(tmp_path / "a.zip", [("a.png", png(pictures(1)[0])), ("b.png", bytes(1000))])
    content = file.read_bytes()
    assert content.count(struct.pack("<I", 1000)) == 2  # local header and index
    file.write_bytes(content.replace(struct.pack("<I", 1000), struct.pack("<I", 100)))
    with pytest.raises(UserError, match=r"a\.zip': b\.png cannot be unpacked: Bad CRC-32"):
        pixels(file)


def test_truncated_npz_is_noticed(tmp_path):
    file = npz_of(tmp_path / "a.npz", arr_0=pictures())
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"a\.npz' is no readable zip"):
        pixels(file)


def test_lossy_files_and_strangers_are_noted(tmp_path):
    folder_of(tmp_path, pictures(2), ["a.png", "b.png"])
    (tmp_path / "c.jpg").write_bytes(png(pictures(1, seed=1)[0], "JPEG"))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.png").write_text("x")
    notes = ("1 of 3 files are JPEG or WebP: possibly lossy", "2 files that are no images were left out")
    assert open_source(tmp_path).notes == notes
    (tmp_path / "d.png").write_bytes(png(pictures(1, seed=2)[0]))
    result = score_images(tmp_path, reference=DRAWS, metrics=["kid@fashion64"])
    assert result.notes == ("images: 1 of 4 files are JPEG or WebP: possibly lossy", f"images: {notes[1]}")


def test_poisoned_images_are_named(tmp_path):
    images = pictures(8)
    images[3] = 7
    with pytest.raises(UserError, match=r"1 of 8 images are of one grey level \(000003\); remove or replace them"):
        score_images(images, reference=DRAWS, metrics=["kid@fashion64"])
    images = pictures(8)
    images[4:] = images[:4]
    with pytest.raises(UserError, match=r"4 of 8 images are copies of others \(000004, 000005, 000006, 000007\)"):
        score_images(images, reference=DRAWS, metrics=["kid@fashion64"])


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([], "no metric was asked for"),
        (["kid@fashion64"] * 2, "a metric is asked for twice"),
        (["paired-rms@pixels"], r"'paired-rms@pixels' compares pairs; give --baseline .* use `evalbench run`"),
        (["fd_to_converged@fashion64"], "needs a reference of the model itself"),
        (["align@tiny-fashion"], "needs the caption of each image; give --captions FILE"),
        (["accuracy@fashion-classifier"], "needs the class of each image; give --labels FILE"),
        (["fd@inception"], "unknown extractor 'inception'"),
        (["fd@fashion64"], r"needs at least 128 samples \(2 x 64 dimensions\), got 40"),
        (["fd@identity"], "was made by fashion64/"),
    ],
)
def test_metrics_that_images_cannot_answer(metrics, message):
    with pytest.raises(UserError, match=message):
        score_images(pictures(), reference=DRAWS, metrics=metrics)


def test_labels_must_fit():
    metric = ["accuracy@fashion-classifier"]
    for count in (N - 1, N + 1):
        with pytest.raises(UserError, match=f"{N - 1}|{N + 1}"):
            score_images(pictures(), reference=None, metrics=metric, labels=[0] * count)
    assert score_images(pictures(), reference=None, metrics=metric, labels=[0] * N).n == N


# --- references -----------------------------------------------------------------------------------------------------


def test_a_reference_made_of_images_is_those_images(tmp_path, sources):
    theirs = npz_of(tmp_path / "real.npz", arr_0=pictures(150, seed=5))
    facts = make_reference(theirs, "fashion64", tmp_path / "r.safetensors")
    assert (facts["n"], facts["extractor"]) == ("150", extractor_fingerprint("fashion64"))
    assert facts["pixels_sha256"] == pixels(theirs)[1].digest()
    by_file = score_images(sources["npz"], reference=tmp_path / "r.safetensors", metrics=METRICS, allow_small_n=True)
    by_images = score_images(sources["npz"], reference=theirs, metrics=METRICS, allow_small_n=True)
    assert by_file.scores == by_images.scores
    assert verify_reference(tmp_path / "r.safetensors", source=theirs) == []
    assert verify_reference(tmp_path / "r.safetensors", source=sources["npz"]) == ["it was made of other pixels"]


def test_a_reference_has_the_same_bytes_each_time(tmp_path):
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for file in files:
        make_reference(pictures(), "fashion64", file, keep=10)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert read_reference(files[0]).arrays["features"].shape == (10, 64)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_statistics_of_other_tools_are_of_unknown_provenance(tmp_path, dtype, sources):
    features = np.random.default_rng(0).standard_normal((400, 64))
    mean, cov = features.mean(0).astype(dtype), np.cov(features, rowvar=False).astype(dtype)
    # clean-fid, pytorch-fid and EDM write mu and sigma; ADM also mu_s and sigma_s
    file = npz_of(tmp_path / "stats.npz", mu=mean, sigma=cov, mu_s=mean[:3], sigma_s=cov[:3, :3])
    result = score_images(sources["npz"], reference=file, metrics=["fd@fashion64"], allow_small_n=True)
    assert result.notes == (f"reference {file}: provenance unknown",)
    assert result.protocol["references"]["fashion64"]["facts"] == {}
    with pytest.raises(UserError, match="needs single samples"):
        score_images(sources["npz"], reference=file, metrics=["kid@fashion64"])
    spatial = read_reference(file, spatial=True)  # what sFID refers to
    assert np.array_equal(spatial.arrays["mean"], mean[:3])
    assert np.array_equal(spatial.arrays["cov"], cov[:3, :3])
    npz_of(tmp_path / "clean.npz", mu=mean, sigma=cov)
    with pytest.raises(UserError, match="holds mu, sigma; statistics stand under 'mu_s' and 'sigma_s'"):
        read_reference(tmp_path / "clean.npz", spatial=True)
    npz_of(file, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="has 2048 dimensions, features 'fashion64' of these images have 64"):
        score_images(sources["npz"], reference=file, metrics=["fd@fashion64"], allow_small_n=True)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "holds mu; images stand under 'arr_0'"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 4))}, "are no mean and covariance"),
        ({"mu": np.array([None]), "sigma": np.eye(1)}, "cannot be read: Object arrays cannot be loaded"),
    ],
)
def test_bad_statistics_are_named(tmp_path, arrays, message):
    with pytest.raises(UserError, match=rf"stats\.npz'.* {message}"):
        score_images(pictures(), reference=npz_of(tmp_path / "stats.npz", **arrays), metrics=["fd@fashion64"])


def test_shipped_references_are_verified():
    for file in sorted(shipped.FOLDER.glob("*fashion64.safetensors")):
        assert verify_reference(file) == []


def damaged(tmp_path, change):
    """A reference whose arrays were changed after it was written, header and all else kept."""
    from safetensors.numpy import save_file

    file = tmp_path / "r.safetensors"
    make_reference(pictures(), "fashion64", file)
    reference = read_reference(file)
    arrays = {name: array.copy() for name, array in reference.arrays.items()}
    change(arrays)
    save_file(arrays, file, metadata={"facts": json.dumps(dict(reference.facts))})
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["mean"].__setitem__(0, np.nan), "'mean' holds NaN or infinity"),
        (lambda a: a["mean"].__setitem__(0, 1.0), "their digest differs"),
    ],
)
def test_damaged_references_are_named(tmp_path, change, message):
    file = damaged(tmp_path, change)
    assert any(message in line for line in verify_reference(file))
    with pytest.raises(UserError, match=message):
        verify_command(file)


@pytest.mark.parametrize(
    ("cov", "message"),
    [
        (np.array([[1.0, 0.5], [0.0, 1.0]]), "'cov' is not symmetric"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "not positive semidefinite: smallest eigenvalue -1"),
        (np.eye(3), "'cov' has shape (3, 3) for 2 dimensions"),
    ],
)
def test_impossible_covariances_are_named(tmp_path, cov, message):
    from safetensors.numpy import save_file

    file = tmp_path / "r.safetensors"
    save_file({"mean": np.zeros(2), "cov": cov}, file)
    assert len(wrong := verify_reference(file)) == 1
    assert message in wrong[0]


def test_packed_statistics_are_verified_too(tmp_path):
    from safetensors.numpy import save_file

    file = tmp_path / "r.safetensors"
    save_file(pack_statistics(np.random.default_rng(0).standard_normal((50, 4))), file)
    assert verify_reference(file) == []
    assert read_reference(file).notes == ("provenance unknown",)


def test_a_broken_reference_file_is_named(tmp_path):
    file = tmp_path / "r.safetensors"
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"r\.safetensors' cannot be read"):
        read_reference(file)
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        make_reference(pictures(), "fashion64", tmp_path / "r.npz")
    with pytest.raises(UserError, match="--keep -1: give the number"):
        make_reference(pictures(), "fashion64", tmp_path / "r.safetensors", keep=-1)
    with pytest.raises(UserError, match="not found; create it first"):
        make_reference(pictures(), "fashion64", tmp_path / "no" / "r.safetensors")


# --- plans ----------------------------------------------------------------------------------------------------------


def planned(images, plan, labels=None):
    return score_images(images, reference=None, metrics=["vendi@fashion64"], labels=labels, plan=plan)


def test_images_that_keep_to_the_plan_are_scored(tmp_path):
    images = folder_of(tmp_path / "made", pictures(), [f"{i}.png" for i in range(N)])
    (tmp_path / "plan.tsv").write_text("".join(f"{i}.png\t{i % 10}\n" for i in range(N)))
    names = sorted(f"{i}.png" for i in range(N))
    labels = [int(name.split(".")[0]) % 10 for name in names]
    for plan in (read_plan(str(tmp_path / "plan.tsv")), read_plan("balanced:10")):
        assert planned(images, plan, labels).n == N
    (tmp_path / "ids.txt").write_text("".join(f"{i}\n" for i in range(N)))
    (tmp_path / "plan.json").write_text(json.dumps({f"{i}": i % 10 for i in range(N)}))
    assert planned(images, read_plan(str(tmp_path / "ids.txt"))).n == N
    assert planned(images, read_plan(str(tmp_path / "plan.json")), labels).n == N


def test_what_differs_from_the_plan_is_named(tmp_path):
    kept = (0, 1, 2, 3, 4, 5, 6, 9, *range(10, 40))
    images = folder_of(tmp_path / "made", pictures(len(kept)), [f"{i:02d}.png" for i in kept])
    (tmp_path / "plan.tsv").write_text("".join(f"{i:02d}\t{i % 2}\n" for i in range(40) if i != 9))
    message = "made' holds 38 images, planned are 39: 2 missing (07, 08), 1 not planned (09.png)"
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        planned(images, read_plan(str(tmp_path / "plan.tsv")))
    assert caught.value.exit_code == 2
    (tmp_path / "plan.tsv").write_text("".join(f"{i:02d}\t{i % 2}\n" for i in kept))
    plan, labels = read_plan(str(tmp_path / "plan.tsv")), [i % 2 for i in kept]
    labels[2] = labels[4] = 1
    message = "2 images have another class than planned (02.png has 1, not 0, 04.png has 1, not 0)"
    with pytest.raises(UserError, match=re.escape(message)):
        planned(images, plan, labels)


def test_a_wrong_label_histogram_is_named():
    labels = [0, 1, 2, 3] * 10
    assert planned(pictures(), read_plan("balanced:4"), labels).n == N
    labels[:5] = [3] * 5
    message = "4 classes are not equally often among 40 images: class 3 14 times (000000, 000001, "
    with pytest.raises(UserError, match=re.escape(message)):
        planned(pictures(), read_plan("balanced:4"), labels)
    with pytest.raises(UserError, match=r"classes are 0 to 2, but 000000 has 3, 000001 has 3, "):
        planned(pictures(), read_plan("balanced:3"), labels)
    with pytest.raises(UserError, match=r"--plan balanced:4 needs the class of each image; give --labels FILE"):
        planned(pictures(), read_plan("balanced:4"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("balanced:x", "--plan balanced:x: write balanced:10 for ten classes equally often, or a file"),
        ("{tmp}/none.tsv", "--plan '{tmp}/none.tsv': [Errno 2]"),
        ("{tmp}/bad.tsv", "--plan '{tmp}/bad.tsv': invalid literal for int() with base 10: 'shoe'; write lines id or"),
        ("{tmp}/twice.tsv", "--plan '{tmp}/twice.tsv': an image id stands there twice"),
    ],
)
def test_bad_plans_are_named(tmp_path, text, message):
    (tmp_path / "bad.tsv").write_text("a\tshoe\n")
    (tmp_path / "twice.tsv").write_text("a.png\t1\na\t2\n")
    with pytest.raises(UserError, match="^" + re.escape(message.replace("{tmp}", str(tmp_path)))):
        read_plan(text.replace("{tmp}", str(tmp_path)))


def test_classes_of_an_adm_npz_are_its_labels(tmp_path):
    labels = np.arange(N) % 10
    file = npz_of(tmp_path / "adm.npz", arr_0=pictures(), arr_1=labels)
    metrics = ["accuracy@fashion-classifier"]
    expected = score_images(pictures(), reference=None, metrics=metrics, labels=labels.tolist())
    assert score_images(file, reference=None, metrics=metrics).scores == expected.scores
    other = npz_of(tmp_path / "other.npz", arr_0=pictures(), arr_1=np.zeros((N, 3)))
    with pytest.raises(UserError, match="needs the class of each image"):
        score_images(other, reference=None, metrics=metrics)


# --- commands -------------------------------------------------------------------------------------------------------


def test_sizes_give_a_curve(sources, capsys):
    result = score_images(sources["npz"], reference=DRAWS, metrics=["kid@fashion64"], sizes=[10, 20, N])
    (found,) = result.curves
    assert [value.n for value in found.values] == [10, 20, N]
    assert found.values[-1].value == pytest.approx(result["kid@fashion64"].value, rel=1e-5)
    score_command(str(sources["npz"]), str(DRAWS), ["kid@fashion64"], False, sizes="10,20")
    shown = capsys.readouterr().out
    assert "kid@fashion64 over N: " in shown
    assert "    N = 10 " in shown
    with pytest.raises(UserError, match="--sizes 10,x: write sample counts with commas"):
        score_command(str(sources["npz"]), str(DRAWS), ["kid@fashion64"], False, sizes="10,x")


def test_commands_print_what_they_found(tmp_path, capsys, sources):
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(str(i % 10) for i in range(N)))
    metrics = ["kid@fashion64", "accuracy@fashion-classifier"]
    assert score_command(str(sources["zip"]), str(DRAWS), metrics, False, labels=str(labels)) == 0
    shown = capsys.readouterr().out
    assert "40 images" in shown
    assert re.search(r"kid@fashion64 +↓ [\d.e+]+  \[[\d.e+]+, [\d.e+]+\]  squared MMD", shown)
    assert score_command(str(sources["zip"]), str(DRAWS), ["kid@fashion64"], True) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["scores"][0]["metric"]) == (N, "kid@fashion64")
    assert found["protocol"]["references"]["fashion64"]["facts"]["source"] == "draws"

    file = tmp_path / "r.safetensors"
    assert make_command(str(sources["npz"]), "fashion64", file) == 0
    made = json.loads(capsys.readouterr().out)
    assert show_command(file) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == made["sha256"]
    assert verify_command(file, str(sources["npz"])) == 0
    assert capsys.readouterr().out == f"{file}: ok\n"


def test_bad_labels_are_named(tmp_path):
    (tmp_path / "l.txt").write_text("1\nshoe\n")
    with pytest.raises(UserError, match=r"l\.txt': write one whole number per line"):
        score_command("x", None, ["accuracy@fashion-classifier"], False, labels=str(tmp_path / "l.txt"))


def test_features_that_are_not_finite_are_no_reference(monkeypatch):
    from evalbench.metrics.extractors import Identity

    monkeypatch.setattr(Identity, "__call__", lambda self, batch: batch.x.flatten(1) * float("nan"))
    with pytest.raises(EvalbenchError, match="NaN or infinite"):
        score_images(pictures(), reference=pictures(seed=1), metrics=["kid@identity"])
