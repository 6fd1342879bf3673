"Writes README.md, and the pictures it shows, from nbs/index.ipynb as saved: python tools/readme.py"
import json
import re
from base64 import b64decode
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURES = "index_files"  # beside README.md, as Quarto would name it
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)
LINK = re.compile(r"(\]\(|src=\")(?![a-z]+:|#|/)")  # a link or picture whose target is relative


def markdown(nb, folder="nbs/"):
    "(README text, {picture file: bytes}) of a notebook; `hide`, `echo: false` and `output: false` mean what they mean to Quarto."
    parts, pictures = [], {}
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown": parts.append(moved(source, folder))
        if cell["cell_type"] != "code": continue
        head, code = re.match(r"((?:#\|[^\n]*\n?)*)(.*)", source, re.S).groups()
        flags = {line.removeprefix("#|").strip() for line in head.splitlines()}
        if "hide" in flags: continue
        if code.strip() and "echo: false" not in flags: parts.append(f"```python\n{code.strip()}\n```")
        if "output: false" not in flags: parts += [shown(o, pictures) for o in cell["outputs"]]
    return "\n\n".join(p.strip() for p in parts if p.strip()) + "\n", pictures


def moved(source, folder):
    "Markdown of a notebook in `folder`, with the relative links that hold one folder up; code in it stays as it is."
    move = lambda text: LINK.sub(rf"\1{folder}", text).replace(f"{folder}../", "")
    return "".join(text if i % 2 else move(text) for i, text in enumerate(CODE.split(source)))


def shown(output, pictures):
    "One saved output as Markdown; a PNG goes into `pictures`."
    data = output.get("data", {})
    if "image/png" in data:
        name = f"{PICTURES}/{len(pictures)}.png"
        pictures[name] = b64decode("".join(data["image/png"]))
        return f"![]({name})"
    if "text/markdown" in data: return "".join(data["text/markdown"])
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```\n{text.rstrip()}\n```" if text.strip() else ""


def main(root=ROOT):
    text, pictures = markdown(json.loads((root / "nbs/index.ipynb").read_text(encoding="utf-8")))
    (root / "README.md").write_text(text, encoding="utf-8")
    for old in (root / PICTURES).glob("*.png"): old.unlink()
    for name, png in pictures.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(png)


if __name__ == "__main__": main()
