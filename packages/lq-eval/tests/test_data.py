import json

from lq_eval.data import calibration_text_path, eval_text_path, tiny_llama_path


def test_the_bundled_model_is_in_the_hugging_face_layout():
    folder = tiny_llama_path()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 256


def test_the_texts_are_what_the_notes_say():
    assert len(eval_text_path().read_text(encoding="utf-8")) == 178_254
    assert len(calibration_text_path().read_text(encoding="utf-8")) == 200_000


def test_the_licences_travel_with_the_texts():
    notice = (eval_text_path().parent / "LICENSE-PSF.txt").read_text()
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in notice
    assert "Python Software Foundation" in (eval_text_path().parents[1] / "README.md").read_text()
