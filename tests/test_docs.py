"""The documentation is true: links lead somewhere, code blocks run or name what exists, tables are their data's."""

import ast
import importlib
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FENCE = re.compile(r"^( *)(<!-- check: (\w+) -->\n)?( *)```(\w+)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
GENERATED = {"settings.md"}  # docs/site_hooks.py writes it when the site is built
OTHERS = (
    "pip",
    "python",
    "pytest",
    "ruff",
    "accelerate",
    "torchrun",
    "tensorboard",
    "fastppo",
    "mkdocs",
    "cd",
    "export",
)


def blocks(language, texts=TEXTS, leave=("trl",)):
    """Every block in that language, but for those marked <!-- check: trl --> (another library's code) or the like."""
    found = []
    for path in texts:
        text = path.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match[5] == language and match[3] not in leave:
                line = text.count("\n", 0, match.start()) + 1
                found.append(pytest.param(match[6], id=f"{path.relative_to(ROOT)}:{line}"))
    return found


def without_code(text):
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchor(heading):
    """A heading's id, as Python-Markdown's toc makes it."""
    plain = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading)).strip().lower()
    return re.sub(r"[-\s]+", "-", plain)


def anchors(path):
    return {
        anchor(line.lstrip("#"))
        for line in FENCE.sub("", path.read_text(encoding="utf-8")).splitlines()
        if line[:1] == "#"
    }


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"https?://", target):
            continue
        name, _, mark = target.partition("#")
        file = page.parent / name if name else page
        assert file.is_file() or name in GENERATED, f"{page.name} links to {target}: there is no {file}"
        inside = (ROOT / "docs").resolve() in file.resolve().parents
        assert inside or page not in PAGES, (
            f"{page.name} links to {target}, which is not on the site: name it in backticks"
        )
        if mark:
            assert mark in anchors(file), f"{page.name} links to {target}: no such heading"


def test_the_sites_navigation_names_pages_that_exist():
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [page for part in parts for page in pages(part)]

    named = pages(settings["nav"])
    assert not [page for page in named if page not in GENERATED and not (ROOT / "docs" / page).is_file()]
    assert len(named) == len(set(named)) and "index.md" in named


def test_snippets_and_api_names_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r'^--8<-- "([^":]+)', text, re.MULTILINE):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"
            links = re.findall(r"\]\((?!https?:)([^)]+)\)", without_code((ROOT / name).read_text(encoding="utf-8")))
            assert not links, f"{name} stands on the site, where {links} lead elsewhere: name them in backticks"
        for name in re.findall(r"^::: (\S+)", text, re.MULTILINE):
            resolve(f"fastppo.{name}" if name.startswith("kernels.") else name)


def test_every_public_name_is_on_the_api_page_with_a_docstring():
    import fastppo
    import fastppo.experimental.ppo as late

    ops = [path.stem for path in (ROOT / "kernels").glob("[a-z]*.py")]
    text = "\n".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("api.md", "api_kernels.md"))
    page = set(re.findall(r"^::: (\S+)", text, re.MULTILINE))
    public = [getattr(module, name) for module in (fastppo, late) for name in module.__all__ if name != "__version__"]
    for thing in public:
        assert inspect.getdoc(thing), thing
        assert {thing.__module__, f"{thing.__module__}.{thing.__name__}"} & page, f"docs/api.md lacks {thing}"
    assert all({f"kernels.{op}", f"kernels.{op}.{op}"} & page for op in ops), "docs/api_kernels.md lacks a kernel"


def resolve(dotted):
    """The object of a dotted name; raises where there is none."""
    module, rest = dotted, []
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError as error:
            if not module.startswith(error.name or "?") or "." not in module:
                raise
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
    for part in rest:
        found = getattr(found, part)
    return found


# --- Python -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", blocks("python"))
def test_python_imports_and_arguments_exist(code):
    tree, known = ast.parse(code), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            known |= {name.asname or name.name: getattr(module, name.name) for name in node.names}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        target = known.get(getattr(call.func, "id", None))
        if not getattr(target, "__module__", "").startswith("fastppo"):
            continue
        parameters = inspect.signature(target).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and not isinstance(target, type):
            continue
        for keyword in call.keywords:
            assert keyword.arg is None or keyword.arg in parameters, f"{target.__name__} has no {keyword.arg}"


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A folder with a tiny model and its tokenizer, in the place of gpt2."""
    import torch

    from fastppo.cli.stories import corpus
    from fastppo.cli.tiny_lm import new_model, train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer([f"{a} {b}" for a, b in corpus(200, 0)])
    folder = tmp_path_factory.mktemp("docs") / "model"
    new_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# The others are fragments, which take names from the text around them; their imports were checked above.
PROGRAMS = [block for block in blocks("python", PAGES) if block.values[0].startswith(("import ", "from "))]


@pytest.mark.parametrize("code", PROGRAMS)
def test_the_sites_python_runs(code, small_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace('"gpt2"', repr(str(small_model))), "docs", "exec"), {"__name__": "docs"})


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(block):
    """The commands of a block, as lists of words; comments, prompts and what is set in front (A=b) are left out."""
    for line in block.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\||;", re.sub(r"(^|\s)#.*", "", line)):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def options_of(command):
    """The dataclass that the command's flags fill."""
    from fastppo.cli.stage_options import flat_class

    module = importlib.import_module(f"fastppo.cli.{command}")
    if hasattr(module, "STAGE"):
        return flat_class(command, module.STAGE.options, module.STAGE.config_class)
    return module.options_class() if command == "train" else getattr(module, f"{command.title()}Options")


def parse_fastppo(words):
    """The command's own parser takes the words; files that they name need not be there."""
    from fastppo.cli import COMMANDS
    from fastppo.cli.checkpoints import take_resume
    from fastppo.cli.options import parse, take_config
    from fastppo.cli.pipeline import read_plan, split_flags, stage_given

    command, *argv = words[1:]
    assert command in COMMANDS, f"there is no command {command}"
    rest, file = take_config([word for word in argv if word != "--help"])
    stages = {}
    if command == "train":
        rest, _ = take_resume(rest)
    elif command == "pipeline":
        if file and (ROOT / file).is_file():
            plan = read_plan([*rest, "--config", str(ROOT / file)])
            assert all(stage_given(plan, stage) for stage in plan.flags)
        rest, stages = split_flags(rest)
    for name, given in {command: rest, **stages}.items():
        if given or command != "report":  # whose folders must be given
            assert parse(options_of(name), given, f"fastppo {name}")


def check_script(words):
    """python FILE --flags, python -m MODULE, pytest FILES: the file is there and knows the flags."""
    words = [word for word in words if word not in ("-q", "-W", "error")]
    if words[1:2] == ["-m"]:
        path = ROOT / (words[2].replace(".", "/") + ".py")
        assert path.is_file() or importlib.util.find_spec(words[2].partition(".")[0]), words
        return
    files = [word for word in words[1:] if word.endswith(".py") and "/" in word]
    assert all((ROOT / file).is_file() for file in files), words
    if files and files[0] != "setup.py":
        source = (ROOT / files[0]).read_text(encoding="utf-8")
        for word in words:
            if word.startswith("--") and words[0] == "python":
                flag = word.partition("=")[0]
                assert flag in source or flag[2:].replace("-", "_") in source, f"{files[0]} has no {flag}"


def named_commands():
    """Every `fastppo ...` between backticks, without placeholders (`fastppo COMMAND`, `fastppo a | b`, `RUN...`)."""
    found = set()
    for path in [*TEXTS, ROOT / "CHANGELOG.md"]:
        text = FENCE.sub("", path.read_text(encoding="utf-8"))
        found |= {" ".join(command.split()) for command in re.findall(r"`(fastppo [a-z][^`]*)`", text)}
    return sorted(command for command in found if not re.search(r"[|\[]|\.\.\.", command))


@pytest.mark.parametrize("command", named_commands())
def test_commands_in_the_text_parse(command):
    parse_fastppo(shlex.split(command))


def test_a_command_that_does_not_exist_is_found(capsys):
    with pytest.raises(AssertionError, match="no command trian"):
        parse_fastppo(["fastppo", "trian"])
    for words in (["train", "--learning-rat", "1"], ["pipeline", "--ppo.kl-coeff", "1"], ["plan", "--gpus", "two"]):
        with pytest.raises(SystemExit):
            parse_fastppo(["fastppo", *words])
    assert "--learning-rat" in capsys.readouterr().err


def check_extras(words):
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for names in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(names.split(",")) <= set(extras), f"no extra {names}"


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands_and_flags_exist(block):
    for words in commands(block):
        assert words[0] in OTHERS, f"what is {words[0]}?"
        if "fastppo" in words:
            parse_fastppo(words[words.index("fastppo") :])
        elif words[0] in ("python", "pytest"):
            check_script(words)
        elif words[0] == "pip" and sys.version_info >= (3, 11):
            check_extras(words)


def test_the_five_steps_of_contributing_name_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    steps = text[text.index("## Add a kernel in five steps") : text.index("## Style")]
    assert re.findall(r"^(\d)\. ", steps, re.MULTILINE) == list("12345")
    for name in re.findall(r"`([^`\n]+)`", steps):
        name = name.replace("<op>", "gae").split("(")[0]
        if "/" in name:
            assert (ROOT / name).exists(), name
        elif re.fullmatch(r"[\w.]+", name):
            last = name.rpartition(".")[2]
            files = [p for folder in ("kernels", "csrc", "bench", "tests") for p in (ROOT / folder).rglob("*.*")]
            sources = (p.read_text() for p in files if p.suffix in (".py", ".cpp", ".cu", ".h", ".inc"))
            assert any(re.search(rf"\b{last}\b", source) for source in sources), name


def test_tests_that_are_named_exist():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    for page in TEXTS:
        for name in re.findall(r"`(?:tests/)?(test_\w+)", page.read_text(encoding="utf-8")):
            known = f"def {name}(" in sources or (ROOT / "tests" / f"{name}.py").is_file()
            assert known, f"{page.relative_to(ROOT)} names {name}"


# --- figures and tables -----------------------------------------------------------------------------------------------


def test_tables_are_their_experiments():
    plots = runpy.run_path(str(ROOT / "docs/experiments/plot.py"))
    page = ROOT / "docs/guides/hyperparameters.md"
    assert plots["with_tables"](page.read_text()) == page.read_text(), "run python docs/experiments/plot.py"
    assert plots["spread"]([3.0, 1.0, 2.0], ".0f") == "2 (1 to 3)"


def test_every_run_behind_the_guides_can_be_made_again():
    known = runpy.run_path(str(ROOT / "docs/experiments/run.py"))["EXPERIMENTS"]
    recorded = {path.stem.rpartition("-seed")[0] for path in (ROOT / "docs/experiments/data").glob("*.jsonl")}
    assert recorded == set(known)


def test_every_setting_is_on_its_page():
    from dataclasses import fields

    from fastppo import PPOConfig

    text = runpy.run_path(str(ROOT / "docs/site_hooks.py"))["page"]()
    assert all(f"| `{field.name}` |" in text for field in fields(PPOConfig) if field.init)
    assert "beta: reward = score - beta * KL" in text and "`kl_estimator`" in text


def test_the_kernels_page_begins_with_readmes_tables():
    hooks = runpy.run_path(str(ROOT / "docs/site_hooks.py"))
    page = hooks["on_page_markdown"]((ROOT / "docs/kernels.md").read_text(encoding="utf-8"))
    assert "\n| generate + score + step |" in page and "<!-- bench" not in page
    name = "test_a_score_that_is_no_number_changes_nothing"
    assert "<wbr>nothing" in hooks["on_page_content"](f"<td><code>{name}</code></td>")
    assert "<wbr>" not in hooks["on_page_content"](f"<td><code>seed_all</code></td><p><code>{name}</code></p>")


def test_the_site_builds_without_a_warning(tmp_path):
    """Where mkdocs is installed (pip install -e ".[docs]", as CI does); the tests above hold without it."""
    pytest.importorskip("mkdocs_autorefs", reason='the site is built where pip install -e ".[docs]" was run')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "PPOTrainer" in (tmp_path / "site/api/index.html").read_text()
