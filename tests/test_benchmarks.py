"""The benchmarks run, refuse unequal work, and count operations as one does by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    words = ["red", "green", "blue", "one", "two", "three", "sea", "sky", "tree", "stone"]
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = []
    for i in range(40):
        text = [" ".join(words[(i * 7 + j * k) % 10] for j in range(2 + (i * k) % 9)) for k in (3, 5, 7)]
        rows.append({"prompt": f"Say {i}: {text[0]}.", "chosen": f" {text[1]}.", "rejected": f" {text[2]}, not {i}."})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(script, data, out, *more):
    sizes = "--shape tiny --hidden 32 --intermediate 48 --heads 2 --vocab 300 --batch 4 --pairs 12 --lr 3e-3"
    command = [sys.executable, str(FOLDER / script), "--data", str(data), *sizes.split(), "--max-length", "64"]
    done = subprocess.run([*command, "--out", str(out), *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_throughput_of_our_side(data, tmp_path):
    said = run("throughput.py", data, tmp_path, "--rounds", "1", "--runs", "lit_dpo,lit_dpo_micro,lit_dpo_live")
    cached, micro, live = lines(tmp_path / "throughput.jsonl")
    for record in (cached, micro, live):
        assert record["timed_pairs"] == 12
        assert record["timed_steps"] == len(record["step_wall_s"]) == 3
        assert record["train_wall_s"] > 0
        assert record["train_cpu_s"] > 0
        assert record["peak_bytes"] > 1e7
        assert record["computed_tokens"] < record["real_tokens"]  # each prompt once
        assert record["reference_pairs"] == 16  # the warm-up's too
        assert len(record["losses"]) == 3
        assert record["shape"]["vocab"] == 300
        assert record["settings"]["batch"] == 4
        assert {"command", "date", "hardware", "threads", "seed", "versions", "data"} <= set(record)
        assert str(data) not in record["command"]
    assert (cached["reference"], live["reference"]) == ("CachedReference", "FrozenReference")
    assert cached["reference_cpu_s"] > 0
    assert live["reference_cpu_s"] == 0
    assert cached["batches_digest"] == live["batches_digest"] == micro["batches_digest"]
    assert cached["computed_tokens"] == micro["computed_tokens"]
    assert "lit_dpo_live" in said
    (report,) = tmp_path.glob("throughput_*.md")
    assert "pairs/s, pass counted" in report.read_text()


@pytest.mark.slow
def test_throughput_beside_trl(data, tmp_path):
    pytest.importorskip("trl")
    names = ["trl_default", "trl_best", "trl_best_micro", "trl_best_head", "lit_dpo", "lit_dpo_micro", "lit_dpo_live"]
    run("throughput.py", data, tmp_path, "--rounds", "1", "--runs", ",".join(names))
    records = {record["run"]: record for record in lines(tmp_path / "throughput.jsonl")}
    assert list(records) == names
    assert all("error" not in record for record in records.values())
    assert len({record["pairs_digest"] for record in records.values()}) == 1
    assert records["trl_best"]["reference_cpu_s"] > 0
    assert [records[name]["checkpointing"] for name in names[:4]] == [True, False, False, False]
    assert records["trl_best"]["computed_tokens"] < records["trl_default"]["computed_tokens"]
    assert "lit_dpo / trl_best_head" in next(tmp_path.glob("throughput_*.md")).read_text()


@pytest.mark.slow
def test_cost_of_intermediate_layers(data, tmp_path):
    run("intermediate_cost.py", data, tmp_path, "--rounds", "1", "--layers", "4")
    assert [record["run"][-1] for record in lines(tmp_path / "intermediate_cost.jsonl")] == ["0", "1", "3"]


@pytest.mark.slow
def test_overhead_of_a_step(data, tmp_path):
    said = run("overhead.py", data, tmp_path, "--rounds", "1")
    bare, ours = lines(tmp_path / "overhead.jsonl")
    assert (bare["run"], ours["run"]) == ("bare_loop", "lit_dpo")
    assert bare["losses"] == pytest.approx(ours["losses"], abs=1e-6)
    assert bare["pairs_digest"] == ours["pairs_digest"]
    assert "over the plain loop" in said


@pytest.mark.slow
def test_memory(tmp_path):
    pytest.importorskip("matplotlib")
    sizes = "--vocabs 512 4096 --lengths 64 --vocab 512 --length 32 --hidden 32 --layers 1 --batch 2"
    command = [sys.executable, str(FOLDER / "memory.py"), *sizes.split(), "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    records = lines(tmp_path / "memory.jsonl")
    assert len(records) == 6
    assert all(record["peak_bytes"] > record["weights_bytes"] for record in records)
    small, big = (r["saved_bytes"] for r in records if r["way"] == "lit_dpo" and r["axis"] == "vocab")
    assert small == big  # nothing kept for the backward pass knows the vocabulary
    assert list(tmp_path.glob("memory_*.png"))


@pytest.mark.slow
def test_scaling(tmp_path):
    pytest.importorskip("matplotlib")
    sizes = "--hidden 32 --divide 16 --rounds 2"
    command = [sys.executable, str(FOLDER / "scaling.py"), *sizes.split(), "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    points = lines(tmp_path / "scaling.jsonl")
    assert len(points) == 20
    assert all(len(point["wall_s"]) == 2 and 0 < point["share_of_products"] < 1 for point in points)
    for axis in ("length", "vocab", "layers_scored", "pairs"):
        counted = [point["operations"] for point in points if point["axis"] == axis]
        assert counted == sorted(counted)
    assert list(tmp_path.glob("scaling_*.png"))


@pytest.mark.slow
def test_gpu_script_on_a_cpu(tmp_path):
    sizes = "--device cpu --shape tiny --divide 16 --steps 6 --seconds 2 --pairs 2 --threads 1"
    command = [sys.executable, str(FOLDER / "gpu.py"), *sizes.split(), "--parts", "exactness", "llama-3.2-1b"]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, capture_output=True)
    exactness, speed = lines(tmp_path / "gpu.jsonl")
    assert exactness["ok"]
    assert [profile["profile"] for profile in speed["profiles"]] == ["ultrafeedback", "hh"]
    assert isinstance(speed["profiles"][0]["lightning_s_per_pair"], float)


@pytest.mark.usefixtures("benchmarks")
class TestEqualWork:
    def records(self, **changes):
        shared = {"order": "shuffled", "pairs_digest": "a", "batches_digest": "b", "losses": [0.693147, 0.71, 0.68]}
        return [{"run": "lit_dpo", **shared}, {"run": "trl_default", **shared, **changes}]

    def test_equal_work_passes(self):
        from contest import verify

        verify(self.records(losses=[0.693147, 0.71009, 0.68]))
        verify([*self.records(), {"run": "trl_best", "error": "killed"}])

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"pairs_digest": "c"}, "token ids of trl_default"),
            ({"batches_digest": "c"}, "other pairs into a batch"),
            ({"losses": [0.693147, 0.71011, 0.68]}, "First losses differ"),
            ({"losses": [0.693147, 0.71, float("nan")]}, "First losses differ"),
            ({"losses": []}, "First losses differ"),
        ],
    )
    def test_unequal_work_is_refused(self, changes, reason):
        from contest import UnequalError, verify

        with pytest.raises(UnequalError, match=reason):
            verify(self.records(**changes))

    def test_losses_that_prove_nothing_are_refused(self):
        from contest import UnequalError, verify

        still = [0.693147, 0.693148, 0.693147]
        with pytest.raises(UnequalError, match="hardly move"):
            verify([record | {"losses": still} for record in self.records()])

    def test_one_other_token_is_another_pair(self):
        from workers import identity

        pair, other = ([1, 2], [3], [4, 5]), ([1, 2], [3, 4], [5])
        assert identity([[pair]]) != identity([[other]])
        swapped, straight = identity([[pair], [other]]), identity([[other], [pair]])
        assert swapped["pairs_digest"] == straight["pairs_digest"]
        assert swapped["batches_digest"] != straight["batches_digest"]


@pytest.mark.usefixtures("benchmarks")
class TestCountedWork:
    def test_hand_count(self):
        """Hidden 4, feed-forward 6, one block of 2 heads and 1 key head of width 2, vocabulary 10; P C R = 3 2 1.

        Block: q 16, o 16, k 8, v 8, three of 24 = 120 weights. Head 40. Tokens 6, positions at the head 3. Keys seen:
        prompt and chosen 1 + 2 + 3 + 4 + 5 = 15, the one rejected token 3 + 1 = 4, together 19.
        Forward: 2 * 120 * 6 = 1440, 2 * 40 * 3 = 240, scores and values 19 * 4 * 2 * 2 = 304.
        """
        from flops import FORWARD, TRAIN, TRAIN_LORA, TRAIN_TILED, ModelShape, Work, flops

        shape = ModelShape(hidden=4, intermediate=6, layers=1, heads=2, kv_heads=1, vocab=10)
        work = Work.flat([(3, 2, 1)])
        assert (shape.body_params, shape.head_params, work) == (120, 40, (6, 3, 19))
        assert flops(shape, work, FORWARD) == 1440 + 240 + 304
        assert flops(shape, work, TRAIN) == 3 * 1984
        assert flops(shape, work, TRAIN_TILED) == 3 * 1984 + 240
        # Rank 1: a sum of inputs and outputs a layer, 8 + 6 + 6 + 8 + 10 + 10 + 10 = 58 weights.
        assert flops(shape, work, TRAIN_LORA, rank=1) == 4 * 120 * 6 + 4 * 40 * 3 + 3 * 304 + 6 * 58 * 6

    def test_padded_rows(self):
        """Two pairs, longest sequence 5: four rows of 5 tokens, 15 keys seen in each."""
        from flops import Work

        assert Work.padded([(3, 2, 1), (1, 1, 1)]) == (20, 5, 60)
        assert Work.padded([(3, 2, 1), (1, 1, 1)], head_everywhere=True).head_tokens == 20

    def test_shapes_have_their_models_parameters(self):
        """162 M for the M shape, and the published 1.24 and 8.03 thousand million, norms left out."""
        from flops import SHAPES

        def total(shape):
            return shape.body_params + shape.head_params * (1 if shape.tied else 2)

        assert total(SHAPES["M"]) == pytest.approx(162e6, rel=0.01)
        assert total(SHAPES["llama-3.2-1b"]) == pytest.approx(1.236e9, rel=0.001)
        assert total(SHAPES["qwen2.5-1.5b"]) == pytest.approx(1.544e9, rel=0.001)
        assert total(SHAPES["llama-3.1-8b"]) == pytest.approx(8.03e9, rel=0.001)

    def test_both_orders_time_the_same_pairs(self, tmp_path):
        from contest import choose_rows
        from workers import Settings

        settings = Settings(str(tmp_path), "float32", "cpu", 4, warmup=1, steps=4, max_length=64, threads=1, lr=1e-4)
        lengths = {row: (row * 37) % 101 for row in range(60)}
        for within in ("file", "sample", "longest"):
            rows = choose_rows(lengths, settings, within, seed=0)
            assert set(rows["shuffled"][:4]) == set(rows["sorted"][:4])
            assert set(rows["shuffled"][4:]) == set(rows["sorted"][4:])
            assert len(set(rows["sorted"])) == 16
            timed = [lengths[row] for row in rows["sorted"][4:]]
            assert timed == sorted(timed, reverse=True)
        assert min(timed) >= sorted(lengths.values())[-12]


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--seed", "1"], ["--lora"], ["--stepwise"]], ids=lambda more: more[0][2:])
def test_chaos(tmp_path, more):
    """A short one: a fault of each kind, and nothing is lost."""
    command = [sys.executable, str(FOLDER / "chaos.py"), "--faults", "10", "--epochs", "3", *more]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [record] = lines(tmp_path / "chaos.jsonl")
    assert set(record["kinds"].values()) == {1}
    assert record["weights_equal"]
    assert (record["max_loss_difference"], record["rows_lost"], record["rows_repeated"]) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 6), (2, 3)])
def test_chaos_rounds(processes, kills, tmp_path):
    """A few kills of rounds: pairs, losses and weights are those of rounds that were left alone."""
    command = [sys.executable, str(FOLDER / "chaos_rounds.py"), "--kills", str(kills), "--seed", "1"]
    command += ["--processes", str(processes), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [record] = lines(tmp_path / "chaos_rounds.jsonl")
    assert record["kills"] == sum(record["stages"].values()) == kills
    assert (record["differing"], record["outlived"]) == ([], 0)


@pytest.mark.slow
def test_large_data(tmp_path):
    """A small one: what is measured of a million rows, of six thousand."""
    command = [sys.executable, str(FOLDER / "large_data.py"), "--rows", "6000", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [record] = lines(tmp_path / "large_data.jsonl")
    assert record["kept_after_kill"] >= 0.9
    assert record["done_at_kill"] < 6000
    assert 4 * 400 < record["tokens_bytes"] / 6000 < 4 * 402 + 200  # two ends of text, and the record of a row
    for process in record["second"]:
        assert process["reused"] == 6000
        assert process["pairs_read"] > 5900
        assert process["peak_bytes"] < 1.5e9
        assert process["start_s"] < min(record["first_start_s"], 10)
    assert record["table"]["table_find_s"] < 1
    assert len(list(tmp_path.glob("large_data_*.png"))) == 1


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["check.py", "--out", "/a/b", "--rows", "60"], "benchmarks/check.py --out OUT --rows 60"),
        (["claims/sweep.py", "--work", "/a/b", "--out", "c"], "benchmarks/claims/sweep.py --work WORK --out c"),
        (["audit.py", "--sets", "/d/hh/x.gz", "style"], "benchmarks/audit.py --sets DATA/hh/x.gz style"),
    ],
)
def test_a_record_names_no_folder_of_a_machine(benchmarks, monkeypatch, given, shown):
    import common

    monkeypatch.setattr("sys.argv", [str(FOLDER / given[0]), *given[1:]])
    assert common.command_line("/d/hh/x.gz", "style") == f"python {shown}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning and its Trainer, in this process
def test_rounds(benchmarks, tmp_path, monkeypatch, capsys):
    """One round of a few prompts: the counts add up, every pair is as the task says, and the record is written."""
    import rounds
    import sort3

    assert (sort3.answer("50172="), sort3.is_right("50172=", "01257")) == ("01257", True)
    words = ["--seeds", "1", "--rounds", "1", "--rows", "600", "--prompts", "30", "--unseen", "20", "--losses"]
    monkeypatch.setattr("sys.argv", ["rounds.py", *words, "SFT on the chosen", "--out", str(tmp_path)])
    rounds.main()
    [record] = lines(tmp_path / "rounds.jsonl")
    [told] = record["rounds"]
    assert told["completions"] == 240
    assert told["pairs"] + sum(told["without_pair"].values()) == told["prompts"] == 30
    assert len(record["greedy"]) == 2
    [report] = tmp_path.glob("rounds_*.md")
    assert "SFT on the chosen" in report.read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning and its Trainer, in this process
def test_rounds_learned(benchmarks, tmp_path, monkeypatch):
    """Filtered DPO in small: all pairs, filtered, replaced, and an oracle; D2PO's table from records."""
    import rounds_learned

    pairs = rounds_learned.noisy(400, 0)
    right = sum(rounds_learned.is_right(row["prompt"], row["chosen"]) for row in pairs) / len(pairs)
    assert 0.6 < right < 0.75
    words = ["--seeds", "1", "--tasks", "fdpo", "--rows", "600", "--pairs", "40", "--unseen", "20"]
    monkeypatch.setattr("sys.argv", ["rounds_learned.py", *words, "--out", str(tmp_path)])
    rounds_learned.main()
    found = lines(tmp_path / "rounds_learned.jsonl")
    assert len(found) == 4
    assert all(len(record["greedy"]) == 3 for record in found)
    kept = [record["rounds"][0]["pairs"] for record in found]
    assert kept[0] == 40 > kept[1]
    [report] = tmp_path.glob("rounds_learned_*.md")
    assert "paired by seed" in report.read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning and its Trainer, in this process
def test_self_play(benchmarks, tmp_path, monkeypatch):
    """Two rounds of a few rows against SFT: the counts add up, and the record is written."""
    import self_play

    methods = ["SFT", "self-play, segments of 3, DPO 0.1"]
    words = ["--seeds", "1", "--rows", "300", "--prompts", "30", "--steps", "2", "--unseen", "20", "--sft_epochs", "1"]
    monkeypatch.setattr("sys.argv", ["self_play.py", *words, "--methods", *methods, "--out", str(tmp_path)])
    self_play.main()
    plain, record = lines(tmp_path / "self_play.jsonl")
    assert (plain["rounds"], plain["distance"]) == ([], [])
    for told in record["rounds"]:
        assert told["pairs"] + sum(told["without_pair"].values()) == told["prompts"] == 30
    assert len(record["distance"]) == 2
    [report] = tmp_path.glob("self_play_*.md")
    assert methods[1] in report.read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_length(benchmarks, tmp_path, monkeypatch):
    """The judge is as the task says, and the record is written."""
    import length

    assert length.judge("50172=", "0125799") == pytest.approx(1.7)
    assert length.judge("50172=", "0127") == pytest.approx(0.4)
    words = ["--seeds", "1", "--rounds", "1", "--rows", "300", "--prompts", "20", "--unseen", "20", "--sft_epochs", "1"]
    monkeypatch.setattr("sys.argv", ["length.py", *words, "--losses", "DPO 0.1", "--out", str(tmp_path)])
    length.main()
    [record] = lines(tmp_path / "length.jsonl")
    assert [one.keys() for one in record["found"]] == [{"length", "right", "begins right"}] * 2
    [report] = tmp_path.glob("length_*.md")
    assert "DPO 0.1" in report.read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_active(benchmarks, tmp_path, monkeypatch):
    """Two ways of asking with a small budget, which both spend."""
    import active

    words = ["--seeds", "1", "--rounds", "2", "--budget", "60", "--rows", "600", "--prompts", "90", "--unseen", "20"]
    words += ["--samples", "4", "--epochs", "1", "--ways", "random", "entropy + gap", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["active.py", *words])
    active.main()
    records = lines(tmp_path / "active.jsonl")
    assert [record["rounds"][1]["asked_so_far"] for record in records] == [60, 60]
    assert len({record["greedy"][0] for record in records}) == 1
    [report] = tmp_path.glob("active_*.md")
    assert "entropy + gap" in report.read_text()


@pytest.mark.slow
def test_check(tmp_path):
    """A short one: a fit takes the steps that `check` has announced, and both are told."""
    command = [sys.executable, str(FOLDER / "check.py"), "--only", "cached", "--rows", "60", "--repeats", "2"]
    tiny = "{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2}"
    command += ["--out", str(tmp_path), "--more", "--model.model", tiny, "--data.max_length", "64"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [record] = lines(tmp_path / "check.jsonl")
    first, second = record["repeats"]
    assert record["fit_s"] == pytest.approx((first["fit"]["time_s"] + second["fit"]["time_s"]) / 2)
    check, fit = first["check"], first["fit"]
    assert check["steps"] == fit["steps"] == 4
    assert 0 < fit["save_checkpoint_s"] < fit["time_s"] < fit["whole_s"]
    assert check["time_s"] > 0
    assert check["prepare_s"] > 0
    assert fit["prepare_s"] > 0
    assert check["peak_bytes"] == pytest.approx(fit["peak_bytes"], rel=0.15)
    [report] = tmp_path.glob("check_*.md")
    assert "Outside 15%" in report.read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_comparisons_of_runs(benchmarks, tmp_path, monkeypatch):
    """A short one: of equal settings and of others, with one run and with two; a second call trains nothing."""
    import compare

    words = ["--same", "1", "--other", "1", "--seeds", "2", "--rows", "16", "--held-out", "12", "--epochs", "1"]
    words += ["--folder", str(tmp_path / "kept"), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["compare.py", *words])
    compare.main()
    records = lines(tmp_path / "compare.jsonl")
    assert [record["kind"] + str(record["runs"]) for record in records] == ["A/A1"] * 2 + ["A/A2"] * 2 + [
        "A/B1",
        "A/B2",
    ]
    assert records[0]["differences"]["accuracy"]["rows"] == 12
    monkeypatch.setattr("compare.Trainer", None)
    compare.main()
    again = lines(tmp_path / "compare.jsonl")[6:]
    assert [record["differences"] for record in again] == [record["differences"] for record in records]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_cost_of_margins(benchmarks, tmp_path, monkeypatch):
    import margins

    words = ["--shapes", "tiny", "--rows", "32", "--batch", "4", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["margins.py", *words])
    margins.main()
    [record] = lines(tmp_path / "margins.jsonl")
    assert record["steps"] == 16
    assert record["share"] == pytest.approx((record["kept"] + record["states"] + record["files"]) / record["step_ms"])
    assert record["kept"] > 0
