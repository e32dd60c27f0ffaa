"""The console page in a real browser, against a real server with a known state."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.services.chromium import Browser, Page, browsing, find_chromium
from tests.services.console_server import P50_S, P90_S, P99_S, Scene, console_server

pytestmark = [
    pytest.mark.timeout(290),
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed: apt-get install chromium"),
]
IMAGENET_MEAN, IMAGENET_DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
ANSWERED = "document.querySelector('#answer-status').textContent.startsWith('Answered')"
FAILED = "document.querySelector('#answer-status').className === 'failed'"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    found = browser.open_page()
    found.size(1280, 900)
    yield found
    found.close()


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.fixture
def port(scene: Scene) -> Iterator[int]:
    with console_server(scene) as found:
        yield found


def opened(page: Page, port: int) -> None:
    """The page with its first snapshot."""
    page.go(f"http://127.0.0.1:{port}/")
    page.wait_for("document.querySelectorAll('.models tbody').length > 0")


def plain(text: str) -> str:
    return text.replace("\u00a0", " ")


def table(page: Page) -> list[dict[str, str]]:
    """The table of models: the name, and each cell by its column."""
    script = """[...document.querySelectorAll('.models tbody')].map(body => Object.fromEntries(
        [['name', body.querySelector('th').innerText], ...[...body.querySelectorAll('td[data-label]')].map(
            cell => [cell.dataset.label, cell.innerText])]))"""
    return [{name: plain(text) for name, text in row.items()} for row in page.run(script)]


def png(path: Path, pixels: np.ndarray) -> Path:
    """A picture of (height, width, 3) bytes."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(np.uint8))
    chunks = [
        (b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    path.write_bytes(data)
    return path


def sent_tensor(scene: Scene, dtype: str) -> tuple[dict[str, Any], np.ndarray]:
    """The JSON of the last request, and its only tensor."""
    _, headers, body = scene.requests[-1]
    length = int(headers["Inference-Header-Content-Length"])
    head = json.loads(body[:length])
    assert length % 4 == 0, "the tensor must be aligned"
    return head, np.frombuffer(body[length:], dtype).reshape(head["inputs"][0]["shape"])


def answer(page: Page) -> dict[str, list[str]]:
    """The table of outputs by name."""
    rows = page.run(
        "[...document.querySelectorAll('#answer-body .plain tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    return {row[0]: row[1:] for row in rows}


def test_page_shows_what_is_served_without_a_complaint(page: Page, scene: Scene, port: int) -> None:
    opened(page, port)
    assert page.text("h1") == "2 models are served on NVIDIA H200."
    assert page.text("#status").strip() == "Ready"
    assert [row["name"] for row in table(page)] == ["resnet50 version 1", "sentiment version 1"]
    assert table(page)[0] | {"State": "● ready", "Device": "cuda:0", "Memory": "412 MiB"} == table(page)[0]
    assert page.run("document.querySelector('.models a').href").endswith("/v2/onecard/models/resnet50/report")
    page.click(".models details summary")
    page.wait_for("document.querySelector('.facts').innerText.includes('image: FP32 [any, 3, 24, 32]')")
    page.wait_for("document.querySelectorAll('#charts .curve:not([d=\"M0 5H22\"])').length >= 8")
    assert page.complaints() == []
    assert scene.asked_away == [], "the page asks for nothing that is not there"


def test_percentiles_and_rates_are_those_of_the_histograms(page: Page, port: int) -> None:
    opened(page, port)
    page.wait_for("document.querySelector('.models td[data-label=p99]').textContent.endsWith('ms')")
    expected = [f"{value * 1e3:.3g}" for value in (P50_S, P90_S, P99_S)]
    line = "document.querySelector('#charts figure:nth-child(2) path.curve.s2[d^=M]:not([d=\"M0 5H22\"])')"
    page.wait_for(f"{line}?.getAttribute('d').split('L').length > 3")
    end = time.monotonic() + 60
    while not 70 <= float((row := table(page)[0])["Requests"].removesuffix("/s")) <= 130:  # the window fills
        assert time.monotonic() < end, f"a hundred a second are {row}"
        time.sleep(0.5)
    assert [float(row[name].removesuffix(" ms")) for name in ("p50", "p99")] == [float(expected[0]), float(expected[2])]
    spoken = plain(page.run("document.querySelectorAll('#charts .plot[role=img]')[1].getAttribute('aria-label')"))
    for name, value in zip(("p50", "p90", "p99"), (P50_S, P90_S, P99_S), strict=True):
        text = f"{value * 1e3:.3g}"
        assert f"{name} {text if '.' in text else text + '.0'}" in spoken
    assert page.complaints() == []


def test_figures_agree_with_those_of_the_snapshot_module(page: Page, port: int) -> None:
    from onecard.telemetry.histogram import SECONDS, Distribution

    generator = np.random.default_rng(3)
    page.go(f"http://127.0.0.1:{port}/")
    for counts in (generator.integers(0, 50, len(SECONDS) + 1), np.eye(len(SECONDS) + 1, dtype=int)[-1]):
        distribution = Distribution(SECONDS, tuple(map(int, counts)), 1.0)
        for share in (0.01, 0.5, 0.9, 0.99, 1.0):
            script = (
                f"import('./console/figures.js').then(m => m.percentile({list(SECONDS)}, {counts.tolist()}, {share}))"
            )
            assert page.run(script) == pytest.approx(distribution.quantile(share))
    assert page.run("import('./console/figures.js').then(m => m.percentile([1, 2], [0, 0, 0], 0.5))") is None


def test_counters_that_begin_anew_give_no_nonsense(page: Page, scene: Scene, port: int) -> None:
    opened(page, port)
    page.click(".table-box summary")
    page.wait_for("document.querySelector('.models td[data-label=p99]').textContent.endsWith('ms')")
    scene.began_s = time.time() - 20  # as if the server had been started again
    page.wait_for("/up [2-9]\\d\\ss /.test(document.querySelector('#about').textContent)")
    page.wait_for("document.querySelector('.models td[data-label=p99]').textContent.endsWith('ms')")
    script = (
        "[...document.querySelectorAll('#figures tbody tr')].slice(0, 3).map(r => [...r.cells].map(c => c.innerText))"
    )
    for name, *values in page.run(script):
        numbers = [float(value.removesuffix("/s").replace(",", "")) for value in values]
        assert all(0 <= number < 1000 for number in numbers), name
    assert page.complaints() == []


def test_picture_is_sent_as_the_model_wants_it(page: Page, scene: Scene, port: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3))
    opened(page, port)
    page.choose_file("#file", png(tmp_path / "noise.png", pixels))
    page.wait_for("document.querySelector('#picture-name').textContent.includes('32 \u00d7 24')")
    page.click("#send")
    page.wait_for(ANSWERED)
    head, tensor = sent_tensor(scene, "<f4")
    expected = ((pixels / 255 - IMAGENET_MEAN) / IMAGENET_DEVIATION).transpose(2, 0, 1)
    np.testing.assert_allclose(tensor[0], expected, atol=1e-5)
    assert head["inputs"][0] | {"name": "image", "datatype": "FP32", "shape": [1, 3, 24, 32]} == head["inputs"][0]
    found = answer(page)
    assert found["scores"][0] == "FP32 [1, 10]"
    means = expected.mean((1, 2))
    assert [float(text) for text in found["means"][1:3]] == pytest.approx(
        [means.min(), means.max()], rel=0.01, abs=1e-3
    )
    best = page.run("[...document.querySelectorAll('.top')].pop().querySelectorAll('tbody th')[0].innerText")
    assert best == "6", "the greatest of 0 1 2 3 4 5 6 0 1 2"
    assert "Answered in" in page.text("#answer-status")
    assert page.complaints() == []


def test_picture_presets_order_and_layout(page: Page, scene: Scene, tmp_path: Path) -> None:
    scene.models = ("bytes", "halves")
    pixels = np.tile(np.array([250, 128, 3]), (16, 16, 1))
    with console_server(scene) as port:
        opened(page, port)
        page.choose_file("#file", png(tmp_path / "flat.png", pixels))
        page.wait_for("document.querySelector('#picture-name').textContent.includes('16 \u00d7 16')")
        page.fill("#preset", "bytes")
        page.fill("#order", "BGR")
        page.click("#send")
        page.wait_for(ANSWERED)
        head, tensor = sent_tensor(scene, "u1")
        assert head["inputs"][0]["shape"] == [1, 16, 16, 3]
        np.testing.assert_array_equal(tensor[0], pixels[..., ::-1])
        page.fill("#try-model", "halves\n1")
        page.fill("#preset", "own")
        page.fill("#scale", "1/127.5")
        page.fill("#mean", "1")
        page.fill("#order", "RGB")
        count = len(scene.requests)
        page.click("#send")
        page.wait_for("!document.querySelector('#send').disabled")
        assert len(scene.requests) == count + 1
        head, tensor = sent_tensor(scene, "<f2")
        expected = (pixels / 127.5 - 1).astype("<f2").transpose(2, 0, 1)
        np.testing.assert_array_equal(tensor[0], expected)
    assert page.complaints() == []


def test_half_precision_is_numpys(page: Page, port: int) -> None:
    generator = np.random.default_rng(1)
    values = np.concatenate(
        [generator.normal(0, 10.0**power, 200) for power in range(-9, 6)]
        + [np.array([0.0, -0.0, 65504.0, 65519.0, 65520.0, 6e-8, 2**-14, 2**-15, 1 + 2**-11, 1 + 3 * 2**-11])]
    )
    page.go(f"http://127.0.0.1:{port}/")
    script = f"import('./console/protocol.js').then(m => {values.tolist()}.map(m.toHalf))"
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    assert page.run(script) == expected.view(np.uint16).tolist()
    bits = [0, 1, 1023, 1024, 15360, 31743, 32769, 48128]
    script = f"import('./console/protocol.js').then(m => {bits}.map(m.fromHalf))"
    assert page.run(script) == np.array(bits, np.uint16).view(np.float16).astype(float).tolist()


def test_dropped_and_pasted_pictures_are_taken(page: Page, port: int) -> None:
    opened(page, port)
    for event, target, field in (
        ("DragEvent('drop'", "document.querySelector('#drop')", "dataTransfer"),
        ("ClipboardEvent('paste'", "document.body", "clipboardData"),
    ):
        width = 40 if field == "dataTransfer" else 41
        page.run(
            f"(async () => {{const c = new OffscreenCanvas({width}, 20); c.getContext('2d').fillRect(0, 0, 9, 9);"
            "const d = new DataTransfer(); const b = await c.convertToBlob();"
            "d.items.add(new File([b], 'a.png', {type: 'image/png'}));"
            f"{target}.dispatchEvent(new {event}, {{bubbles: true, cancelable: true, {field}: d}}));}})()"
        )
        page.wait_for(f"document.querySelector('#picture-name').textContent.includes('{width} \u00d7 20')")


def test_json_example_is_ready_and_answered(page: Page, scene: Scene) -> None:
    scene.models = ("ids", "resnet50")
    with console_server(scene) as port:
        opened(page, port)
        assert page.run("document.querySelector('#kind-picture').disabled"), "four numbers are no picture"
        request = json.loads(page.run("document.querySelector('#json').value"))
        assert request == {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1, 4], "data": [1, 1, 1, 1]}]}
        page.fill("#json", json.dumps({"inputs": [request["inputs"][0] | {"data": [1, 20, 300, 4000]}]}))
        page.click("#send")
        page.wait_for(ANSWERED)
        assert answer(page)["sum"][:2] == ["INT64 [1]", "4,321"]
        page.click("#raw-box summary")
        assert json.loads(page.text("#raw"))["outputs"][0]["data"] == [4321]
        page.fill("#try-model", "resnet50\n1")
        page.click("#kind-json")
        assert json.loads(page.run("document.querySelector('#json').value"))["inputs"][0]["data"] == {"fill": 0.5}
        page.click("#send")
        page.wait_for("document.querySelector('#answer-body').textContent.includes('corner')")
        assert json.loads(scene.requests[-1][2])["inputs"][0]["data"] == [0.5] * (3 * 24 * 32)
        assert float(answer(page)["means"][1]) == 0.5
    assert page.complaints() == []


def test_text_is_sent_line_by_line(page: Page, scene: Scene, port: int) -> None:
    opened(page, port)
    page.fill("#try-model", "sentiment\n1")
    assert page.run("document.querySelector('#kind-text').checked")
    page.fill("#text-0", "one\nthree <b>\n")
    page.click("#send")
    page.wait_for(ANSWERED)
    sent = json.loads(scene.requests[-1][2])["inputs"][0]
    assert sent == {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["one", "three <b>"]}
    assert answer(page)["lengths"][1:3] == ["3.00", "9.00"] or answer(page)["lengths"][1:3] == ["3", "9"]


def test_refusals_are_shown_as_the_server_says_them(page: Page, scene: Scene, port: int) -> None:
    opened(page, port)
    page.click("#kind-json")
    page.fill("#json", json.dumps({"inputs": [{"name": "wrong", "datatype": "FP32", "shape": [1], "data": [1]}]}))
    page.click("#send")
    page.wait_for(FAILED)
    shown = page.text("#answer-status")
    assert shown.startswith("400 after") and "unknown input 'wrong': the model takes ['image']." in shown
    page.fill("#json", "{")
    page.click("#send")
    page.wait_for("document.querySelector('#answer-status').textContent.includes('not JSON')")
    assert len(scene.requests) == 1, "what is not JSON is not sent"


def test_server_that_is_away_is_said_and_found_again(page: Page, scene: Scene) -> None:
    with console_server(scene) as port:
        opened(page, port)
    page.wait_for("document.querySelector('#status').className.includes('away')")
    first = page.text("#status")
    assert "cannot be reached since" in first and "trying again" in first
    page.wait_for("document.documentElement.classList.contains('stale')")
    announced = page.text("#status-text")
    time.sleep(2)
    assert page.text("#status-text") == announced, "only the words beside it count on, which are not read aloud"
    with console_server(scene, port):
        page.wait_for("document.querySelector('#status').innerText.trim() === 'Ready'")
        assert not page.run("document.documentElement.classList.contains('stale')")


def test_token_is_asked_for_and_used(page: Page, scene: Scene) -> None:
    scene.token = "0123456789abcdef-secret"
    with console_server(scene) as port:
        page.go(f"http://127.0.0.1:{port}/")
        page.wait_for("document.querySelector('#status').textContent.includes('401')")
        assert "this needs the inference token" in page.text("#status")
        assert page.run("document.querySelector('#token-box').open")
        page.fill("#token", scene.token)
        page.run("document.querySelector('#token-form').requestSubmit()")
        page.wait_for("document.querySelectorAll('.models tbody').length === 2")
        page.click("#send")
        page.wait_for(ANSWERED)
        assert "secret" not in page.run(
            "JSON.stringify([Object.entries(localStorage), document.cookie, location.href])"
        )


@pytest.mark.parametrize("kind", ["empty", "not ready", "error"])
def test_other_states_are_said(page: Page, scene: Scene, kind: str) -> None:
    scene.models, scene.ready = (() if kind == "empty" else scene.models), kind != "not ready"
    scene.status = 500 if kind == "error" else 200
    with console_server(scene) as port:
        page.go(f"http://127.0.0.1:{port}/")
        if kind == "empty":
            page.wait_for("document.querySelector('#models-note').textContent.startsWith('No model is loaded')")
            assert page.run("document.querySelector('#try-body').hidden")
        elif kind == "error":
            page.wait_for("document.querySelector('#status').textContent.includes('(500): the state is not told')")
            scene.status = 200
            page.wait_for("document.querySelectorAll('.models tbody').length === 2")
        else:
            page.wait_for("document.querySelector('#status').textContent.includes('Not ready')")
            assert table(page)[0]["State"] == "○ unavailable"
            assert "<b>no</b> variant" in page.text(".why"), "text of the server is text"


def test_models_that_come_and_go(page: Page, scene: Scene, port: int) -> None:
    opened(page, port)
    page.click("#which input[id=which-2]")
    scene.models = ("ids", "resnet50")
    page.wait_for("document.querySelectorAll('.models tbody')[0].innerText.startsWith('ids')")
    assert [row["name"].split()[0] for row in table(page)] == ["ids", "resnet50"]
    assert page.run("document.querySelector('#which input:checked').id") == "which-0", "its model is gone: all again"
    assert page.run("[...document.querySelector('#try-model').options].map(o => o.text)") == ["ids", "resnet50"]
    assert page.complaints() == []


def test_colours_have_contrast_in_both_schemes_and_can_be_chosen(page: Page, port: int) -> None:
    script = """(() => {
      const probe = document.body.appendChild(document.createElement('i'));
      const light = name => {
        probe.style.color = `var(--${name})`;
        const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).map(v => v / 255)
          .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      return Object.fromEntries(NAMES.map(([front, back]) => {
        const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
        return [`${front} on ${back}`, (a + 0.05) / (b + 0.05)];
      }));
    })()"""
    pairs = [[front, back] for front in ("ink", "soft", "best", "bad", "good") for back in ("paper", "panel")]
    lines = [[front, "paper"] for front in ("edge", "s1", "s2", "s3")]
    seen = []
    for scheme in ("light", "dark"):
        page.prefer(prefers_color_scheme=scheme)
        opened(page, port)
        seen.append(page.run("getComputedStyle(document.body).backgroundColor"))
        for listed, least in ((pairs, 4.5), (lines, 3.0)):
            found = page.run(script.replace("NAMES", json.dumps(listed)))
            assert {name: ratio for name, ratio in found.items() if ratio < least} == {}
    assert seen == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]
    page.click("#theme-light")
    assert page.run("getComputedStyle(document.body).backgroundColor") == seen[0]
    opened(page, port)
    assert page.run("getComputedStyle(document.body).backgroundColor") == seen[0], "the choice is kept"


def test_nothing_overflows_a_narrow_screen(page: Page, scene: Scene, port: int) -> None:
    scene.models = ("resnet50", "a-model-with-a-very-long-name-that-nobody-would-type_" * 2, "ids")
    page.size(360, 740, mobile=True)
    opened(page, port)
    page.click(".models details summary")
    page.click("#send")
    page.wait_for(ANSWERED)
    page.wait_for("document.querySelectorAll('#charts circle').length >= 8")
    assert page.run("document.documentElement.scrollWidth") <= 360
    script = """[...document.querySelectorAll('body *')].filter(e => e.getClientRects().length
        && !e.closest('.scroll, svg, .hidden') && e.getBoundingClientRect().right > 361)
        .map(e => e.outerHTML.slice(0, 90))"""
    assert page.run(script) == []


def test_everything_has_a_name_and_can_be_reached_by_keyboard(page: Page, port: int) -> None:
    opened(page, port)
    page.wait_for("document.querySelectorAll('#charts .plot[aria-label]').length === 4")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    wanted = {"button", "textbox", "combobox", "radio", "checkbox", "link", "image", "spinbutton"}
    nameless = [
        node["role"]["value"]
        for node in nodes
        if not node.get("ignored")
        and node.get("role", {}).get("value") in wanted
        and not node.get("name", {}).get("value")
    ]
    assert nameless == []
    reached = set()
    for _ in range(60):
        page.press("Tab", 9)
        reached.add(page.run("document.activeElement.id || document.activeElement.tagName"))
    assert {"try-model", "file", "scale", "send"} <= reached
    assert "theme-auto" in reached or "theme-light" in reached


def test_charts_are_there_as_a_table(page: Page, port: int) -> None:
    opened(page, port)
    page.click(".table-box summary")
    page.wait_for("document.querySelector('#figures').innerText.includes('Latency: p99')")
    names = page.run("[...document.querySelectorAll('#figures tbody th')].map(e => e.textContent)")
    assert {"Throughput: requests", "Queue: waiting", "Temperature: card", "Power: drawn", "Memory: used"} <= set(names)


def test_motion_is_reduced_on_request(page: Page, port: int) -> None:
    page.prefer(prefers_reduced_motion="reduce")
    opened(page, port)
    assert page.run("getComputedStyle(document.querySelector('#send')).transitionDuration") == "0s"
