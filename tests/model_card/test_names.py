"""Names of others are data in a card."""

import json
import random
import re
import string

import pytest
from huggingface_hub import ModelCard

from hf_ihb.hub import run_card
from hf_ihb.markdown import Markdown, code, table, to_markdown, visible
from hf_ihb.redaction import publishable
from tests.model_card.records import ENVIRONMENT, MARKDOWN, body_of, head, records, tables_of
from tests.model_card.test_usage import usage_of

NASTY = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt; &amp; &#60;",
    "a | b || c",
    "\\| a \\\\| b \\",
    "`tick` ``two`` ```three",
    "`",
    "[text](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "https://evil.example www.evil.example me@evil.example <https://evil.example>",
    "line\n---\n# heading\n\n| a |\n|---|\n| b |",
    "---\nlicense: other\n---",
    "\r\n- item\n1. one\n> quote\n```python\nimport os\n```",
    "[ref]: https://evil.example",
    "{{ 7 * 7 }} {% for x in y %} {# c #}",
    "{} {0} {name} %s",
    "**bold** _it_ ~~s~~ $x$ :smile: @user #1",
    "\u202egnp.exe\u202c \u200b\ufeff\u2066",
    "nul\x00 bell\x07 esc\x1b[31m nel\x85 ls\u2028 ps\u2029",
    "lone \ud800 surrogate",
    "'\"\\",
    " lead and trail ",
    "   ",
    "yes",
    "null",
    "123",
    "- a: b",
    "ünï ↔ 猫 🐱",
    "x" * 500,
]


def test_code_shows_every_name_as_it_is():
    draw = random.Random(0)
    alphabet = "`\\|<>&[]()!*_~{}#-:\n\t \u202e" + string.ascii_letters
    names = NASTY + ["".join(draw.choices(alphabet, k=draw.randint(1, 12))) for _ in range(400)]
    for name in names:
        shown = visible(name) if visible(name).strip() else repr(visible(name))
        shown = shown.replace("\\|", "\\x5c|")
        for text, unescape in ((f"a {code(name)} b", str), (f"- {code(name)}", str)):
            tokens = [t for t in MARKDOWN.parse(unescape(text)) if t.type == "inline"]
            spans = [child for token in tokens for child in token.children if child.type != "text"]
            assert [(span.type, span.content) for span in spans] == [("code_inline", shown)], name
        (inner,) = tables_of(table([[Markdown("a"), Markdown("b")], [name, Markdown("c")]]))
        assert inner == [["a", "b"], [shown, "c"]], name
        # GitHub's renderer takes two backslashes for one, and the pipe behind them for the end of the cell
        assert "\\\\|" not in table([[Markdown("a")], [name]])


def test_what_is_no_name_number_or_markdown_is_not_printed():
    for value in (None, True, ["a"], {}):
        with pytest.raises(TypeError):
            to_markdown(value)
    assert Markdown("{} {:.1f}").format(["<b>"], 0.25) == "`['<b>']` 0.2"
    assert isinstance(Markdown("a") + Markdown("b"), Markdown)
    assert Markdown("a") + "b" == "a`b`"


def with_names(name):
    """The files of a run in which every name of others is this one."""
    files = records()
    recipe = files["recipe.json"]
    recipe["recipe"] = f"recipes/{name}"
    recipe["dataset"] |= {"name": name, "revision": None, "label_names": [name, name]}
    recipe["teacher"] = {"name": name, "revision": None}
    recipe["keys"] |= {"dataset_name": name, "dataset_config_name": name, "teacher_model": name}
    recipe["keys"] |= {"model_name_or_path": name, "lr_scheduler_type": name, "optim": name}
    recipe["environment"] = ENVIRONMENT | {
        "device": name,
        "commit": name,
        "mixed_precision": name,
        "versions": {"hf_ihb": name, name + "x": name},
    }
    files["config.json"] |= {"architectures": [name]}
    for file in ("metrics.json", "analysis.json"):
        files[file]["data"] |= {"name": name, "revision": None, "split": name}
        for role in ("model", "teacher", "baseline"):
            if role in files[file]:
                files[file][role] |= {"name": name, "revision": None, "class": name}
    files["metrics.json"]["heads"] = {"averaged": head(0.5), name: head(0.25)}
    return files


def skeleton(text):
    """All there is on the page but words: headings, links, images, tables, code, HTML."""
    return [
        (token.type, token.tag, token.info, tuple(sorted(token.attrs.items())))
        for outer in MARKDOWN.parse(body_of(text))
        for token in (outer, *(outer.children or []))
        if token.type not in ("text", "softbreak")
    ]


@pytest.mark.parametrize("name", NASTY)
def test_no_name_becomes_markup(make_run, name):
    tame = "tame" if name.isalnum() and len(name) < 20 else "a.b"
    benign, hostile = make_run(with_names("a.b"), "a.b"), make_run(with_names(name), "c.d")
    options = {"repo_id": name, "model_name": name, "license": name, "tags": [name]}
    expected = run_card(benign, repo_id="a.b", model_name=tame)
    text = run_card(hostile, **options)
    assert skeleton(text) == skeleton(expected)
    html = MARKDOWN.render(body_of(text))
    assert "<script" not in html
    assert "<img src=x" not in html
    assert 'evil.example"' not in html
    usage_of(text)
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", body_of(text)
    )
    data = ModelCard(text).data
    assert data.license == name
    assert data.tags[-1] == name
    assert data.model_name == name
    published = publishable(
        {file: json.loads(json.dumps(content)) for file, content in with_names(name).items()}, repo_id=name
    )
    where = published["metrics.json"]["data"]
    config = published["recipe.json"]["keys"]["dataset_config_name"]
    for result in data.eval_results:
        assert (result.dataset_type, result.dataset_config) == (where["name"], config)
        assert result.dataset_split == where["split"]
    assert data.teacher_model == published["recipe.json"]["teacher"]["name"]
    assert len(data.to_dict()["model-index"]) == 1
