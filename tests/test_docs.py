"""What the manual shows is executed: Python as it stands, commands with a tiny model, data rows by the reader.

A fence says what happens to its block. ``python`` and ``bash`` run in the order of the page, in one namespace and one
folder a page. ``no-run`` is for what needs a GPU, several nodes, the hub or another package; it is only parsed.
``yaml`` is parsed on top of the DPO configuration, and the rows of a ``json`` block are read. A Python
block that starts with ``# name.py`` is also written to that file.
"""

import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lit_dpo
from lit_dpo.cli import main, signatures
from lit_dpo.cli.tools import TOOLS, WHOLE
from lit_dpo.data.rows import parse_row
from tests import runs
from tests.test_readme import ratios

pytestmark = [
    *runs.QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings("ignore:.*modules? in eval mode"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*no better than chance"),  # a model that knows nothing teaches nothing
]

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))

FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:\w+=\S+ )*(?:lit-dpo|bash configs/launch/torchrun\.sh|sbatch configs/launch/slurm\.sbatch) ")


class Block:
    """A fenced block of a page."""

    def __init__(self, page, match):
        self.page, self.language, self.code = page, match[1], match[3]
        self.marks = match[2].split()
        self.line = page.read_text(encoding="utf-8").count("\n", 0, match.start()) + 2
        unknown = [mark for mark in self.marks if mark != "no-run"]
        assert not unknown, f"{page.name}:{self.line}: unknown marks {unknown}"

    def __repr__(self):
        return f"{self.page.name}:{self.line}"

    @property
    def commands(self):
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def blocks(page):
    return [Block(page, match) for match in FENCE.finditer(page.read_text(encoding="utf-8"))]


BLOCKS = [block for page in PAGES for block in blocks(page)]


def arguments(command):
    """The arguments of `lit-dpo` in a command, through a launch script too."""
    words = shlex.split(command, comments=True)
    start = next(i for i, word in enumerate(words) if word.endswith(("lit-dpo", "torchrun.sh", "slurm.sbatch")))
    return words[start + 1 :]


def tiny(words, folder):
    """The same command with a tiny model and two steps, and with the embedded data unless it names others."""
    if words[0] not in ("fit", "validate", "test", "predict", "inspect", "check"):
        return words
    overlay = yaml.safe_load((ROOT / "tests" / "conf" / "tiny.yaml").read_text())
    if any(word.startswith("--data.train") for word in words):
        del overlay["data"]["train"]
    if "--model.model" in words and Path(words[words.index("--model.model") + 1]).is_dir():  # that the page has made
        del overlay["model"]
    if "--trainer.max_steps" in words:
        del overlay["trainer"]["max_steps"]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    return [*words, "--config", str(folder / "tiny.yaml")]


def parse(words, capsys):
    if words[0] not in ("fit", "validate", "test", "predict", "inspect", "check"):
        return
    shown = any(word in ("--help", "--print_config") or word.endswith(".help") for word in words)
    with pytest.raises(SystemExit) as stop:
        main(words if shown else [*words, "--print_config"])
    assert not stop.value.code, capsys.readouterr().err


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the pages speak of: configurations and a few data sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for start, name in enumerate(("pairs", "easy", "hard", "train", "test")):
        runs.pairs_file(tmp_path, 24, f"{name}.jsonl", start=24 * start)
    before = dict(sys.modules)
    for name in ("my_losses", "my_margin", "my_references", "my_tempered", "my_partition", "my_rows"):
        sys.modules.pop(name, None)  # of another test's folder
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)
    sys.modules.update(before)


QUICK = ("index.md", "concepts.md", "from_trl.md", "methods.md", "README.md")


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=() if page.name in QUICK else pytest.mark.slow, id=page.name) for page in PAGES],
)
def test_a_page_runs(page, folder, capsys):
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            first = block.code.splitlines()[0]
            if re.fullmatch(r"# \w+\.py", first):
                (folder / first.removeprefix("# ")).write_text(block.code)
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            if "no-run" not in block.marks:
                exec(code, namespace)
        elif block.language == "bash":
            for command in block.commands:
                if "no-run" in block.marks:
                    if COMMAND.match(command):
                        parse(arguments(command), capsys)
                elif command.startswith("cp "):
                    subprocess.run(shlex.split(command), check=True)
                else:
                    assert COMMAND.match(command), f"{block}: not a command of ours, so mark it `no-run`: {command}"
                    run(tiny(arguments(command), folder), block, capsys)
        elif block.language == "yaml":
            (folder / "block.yaml").write_text(block.code)
            parse(["fit", "--config", "configs/dpo.yaml", "--config", "block.yaml"], capsys)
        elif block.language == "json":
            for line in block.code.splitlines():
                parse_row(json.loads(line), "manual", repr(block))
        else:
            assert block.language == "text", f"{block}: a language that nothing runs: {block.language}"


def run(words, block, capsys):
    try:
        main(words)
        status = 0
    except SystemExit as stop:
        status = stop.code
    assert not status, f"{block}: {capsys.readouterr().err}"


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(path, folder, monkeypatch):
    compile(path.read_text(), str(path), "exec")
    monkeypatch.setenv("TORCH_NUM_THREADS", "1")
    runpy.run_path(str(path), run_name="__main__")


def test_there_is_something_to_run():
    assert len([block for block in BLOCKS if block.language == "python"]) >= 15
    assert len([block for block in BLOCKS if block.language == "bash"]) >= 15
    assert len(EXAMPLES) >= 4


def test_every_fence_is_seen():
    """A fence that `FENCE` misses would be shown to readers and never run."""
    for page in PAGES:
        assert len(re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)) == 2 * len(blocks(page)), page


def test_own_code_is_short():
    """What one writes to extend the package stays under 40 lines."""
    for block in blocks(DOCS / "extending.md"):
        if block.language == "python":
            assert len(block.code.splitlines()) < 40, block


def test_links_lead_somewhere():
    """Links between pages and to files of the repository; headings are checked by ``mkdocs build --strict``."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page.name, target)


def is_partition(thing):
    return isinstance(thing, type) and issubclass(thing, lit_dpo.Partition)


def test_every_option_that_is_named_exists(capsys):
    """Those in the text and in the tables; the ones in commands are parsed with their command."""
    named = {
        word for page in PAGES for word in re.findall(r"(?<![\w.-])--[a-z][\w.-]*\w", page.read_text(encoding="utf-8"))
    }
    for command in ("fit", *WHOLE, *TOOLS):
        with pytest.raises(SystemExit):
            main([command, "--help"])
    known = set(re.findall(r"--[a-z][\w.-]*\w", capsys.readouterr().out))
    known |= {"--allow-import", "--allow-changes", "--help", "--config", "--predictions", "--version"}
    known |= {"--trust-remote-code", "--overwrite", "--allow-command"}
    known |= {f"--{parameter.name}" for tool in TOOLS for parameter in signatures.tool(tool)}
    known |= {f"--model.{name}" for name in ("loss", "reference", "adapter", "optimizer", "lr_scheduler")}
    other = {"--strict"}  # of mkdocs
    partitions = [part for name in lit_dpo.__all__ if is_partition(part := getattr(lit_dpo, name))]
    known |= {f"--data.partition.{name}" for part in partitions for name in inspect.signature(part).parameters}
    options_of_a_class = {name for name in known if "." in name}  # such as `--model.loss.beta`
    unknown = [name for name in named - other - known if name.rpartition(".")[0] not in options_of_a_class]
    assert not unknown


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert {page.name for page in PAGES} == set(re.findall(r"[\w]+\.md", navigation.partition("\nnav:")[2]))


def test_the_tables_of_methods_name_what_there_is():
    """Each loss of the package has its row among the methods, and each class named there exists."""
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+Loss)", text, re.MULTILINE))
    losses = {name for name in lit_dpo.__all__ if name.endswith("Loss")} - {"PreferenceLoss"}
    assert named == losses


def test_the_reference_lists_every_public_name():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^::: lit_dpo\.(\w+)$", text, re.MULTILINE))
    assert set(lit_dpo.__all__) - {"__version__"} <= named


def test_trl_options_are_all_there():
    """Every option that TRL 1.16's `DPOConfig` adds or changes has its row; the list was read from its source."""
    text = (DOCS / "from_trl.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (.*?) \|", text, re.MULTILINE))))
    assert set(TRL_OPTIONS.split()) <= named, set(TRL_OPTIONS.split()) - named


TRL_OPTIONS = """
model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout dataset_num_proc max_length truncation_mode
padding_free pad_to_multiple_of precompute_ref_log_probs precompute_ref_batch_size loss_type loss_weights ld_alpha
f_divergence_type f_alpha_divergence_coef label_smoothing beta use_weighting discopop_tau activation_offloading
sync_ref_model ref_model_mixup_alpha ref_model_sync_steps pad_token learning_rate logging_steps gradient_checkpointing
bf16 lr_scheduler_kwargs use_liger_kernel torch_empty_cache_steps
"""


SCALE = (DOCS / "scale.md").read_text(encoding="utf-8")
CLAIMS = re.findall(r"^\| .* \| `(trl_\w+)` \| ([\d.]+)x \| ([\d.]+)x \|$", SCALE, re.MULTILINE)
RESULTS = ROOT / "benchmarks" / "results"


def test_the_comparison_is_the_measured_one():
    assert len(CLAIMS) == 5
    for opponent, *shown in CLAIMS:
        speed, memory = ratios(opponent)
        assert shown == [f"{speed:.1f}", f"{memory:.2f}"], opponent
    others = [ratios("trl_best", data)[0] for data in ("gsm8k_lowedit", "oasst_en")]
    assert "it is {:.1f}x on GSM8K pairs, which need little padding, and {:.1f}x on".format(*others) in SCALE


def test_the_tables_of_memory_are_the_measured_ones():
    """Columns of the manual are rows of the results, by length and by vocabulary."""
    (results,) = RESULTS.glob("memory_*.md")
    text = re.sub(r" +", " ", results.read_text(encoding="utf-8"))
    for head, kind in (("tokens of a prompt and a completion", "length"), ("tokens in the vocabulary", "vocab")):
        table = SCALE.partition(f"| {head} |")[2].partition("\n\n")[0].splitlines()
        sizes = [cell.strip().replace(",", "") for cell in table[0].split("|")[:-1]]
        measured = text.partition(f"| {kind} |")[2].partition("\n\n")[0]
        rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table[2:]]
        for column, size in enumerate(sizes):
            found = {}
            for way in ("lit_dpo", "full_logits"):
                cells = re.search(rf"^\| {size} \| {way} \| (.*) \|$", measured, re.MULTILINE)[1].split(" | ")
                found[way] = (cells[4], cells[0])  # saved, peak
            expected = [found["lit_dpo"][0], found["full_logits"][0], found["lit_dpo"][1], found["full_logits"][1]]
            assert [row[column] for row in rows] == expected, (kind, size)


def test_other_numbers_are_the_measured_ones():
    (layers,) = RESULTS.glob("intermediate_cost_*.md")
    rows = re.findall(r"^\| (\d) +\| [^|]+\| ([\d.]+x)", layers.read_text(encoding="utf-8"), re.MULTILINE)
    ratio = dict(rows)
    assert f"{ratio['1']} of plain DPO's time with one layer and {ratio['3']}\nwith three" in SCALE
    (scaling,) = RESULTS.glob("scaling_*.md")
    shares = [int(share) for share in re.findall(r"(\d+)% +\|$", scaling.read_text(encoding="utf-8"), re.MULTILINE)]
    assert f"at {min(shares)} to {max(shares)} % of" in SCALE
    (overhead,) = RESULTS.glob("overhead_*.md")
    steps = re.findall(r"^\| lit_dpo.*?\| ([\d.]+) .* ([\d.]+)x", overhead.read_text(encoding="utf-8"), re.MULTILINE)
    (milliseconds, tiny_ratio), (_, m_ratio) = [(float(time), float(ratio)) for time, ratio in steps]
    assert f"took {tiny_ratio:.2f}x of a plain loop's time with a tiny model of {milliseconds:.0f} ms" in SCALE
    assert m_ratio <= 1.0
    (throughput,) = RESULTS.glob("throughput_*.md")
    section = throughput.read_text(encoding="utf-8").partition("\n## ")[0]
    runs_of = re.findall(r"^\| (lit_dpo\w*): .*$", section, re.MULTILINE)
    cells = {name: re.search(rf"^\| {name}: .*$", section, re.MULTILINE)[0].split("|") for name in runs_of}
    speed, peak = (
        [float(cells[name][column].split()[0]) for name in ("lit_dpo_micro", "lit_dpo")] for column in (5, 7)
    )
    assert f"{peak[0] / peak[1]:.2f}x of the memory, {speed[1] / speed[0]:.1f}x of the time" in SCALE


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == lit_dpo.__version__


def test_what_runs_elsewhere_is_sound():
    """Workflows, forms and hooks parse, and CI runs what anyone can run."""
    for path in (ROOT / ".pre-commit-config.yaml", *sorted((ROOT / ".github").rglob("*.yml"))):
        assert yaml.safe_load(path.read_text(encoding="utf-8"))
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for step in workflow["jobs"]["ci"]["steps"] if "run" in step]
    assert commands == ["bash .ci/run"]


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """Strictly: a link or heading that leads nowhere, or a page in no menu, is an error."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "site" / "index.html").exists()
