import json

import pytest


@pytest.fixture
def make_run(tmp_path):
    def write(files, name="cka", plots=("attention_distance", "cka_linear", "confusion_matrix")):
        folder = tmp_path / name
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (folder / file).write_text(json.dumps(content))
        for plot in plots:
            (folder / "plots" / f"{plot}.png").write_bytes(b"png")
        return folder

    return write
