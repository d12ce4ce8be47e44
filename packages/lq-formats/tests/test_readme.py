import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_examples_run_and_print_what_they_say(capsys):
    """Run the Python blocks in order, in one namespace, and compare what each print says it prints."""
    source = "\n".join(re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S))
    exec(compile(source, str(README), "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    calls = [line for line in source.splitlines() if line.lstrip().startswith("print(")]
    assert len(printed) == len(calls)
    for line, output in zip(calls, printed, strict=True):
        said = line.partition("  # ")[2]
        assert said.startswith(output) or not said
