"""lm-eval's tasks on a model in memory: as lm-eval run by hand on the checkpoint, as a loop without lm-eval, refusals."""

import json
import random
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

import datasets
import lm_eval
import lm_eval.evaluator
import lm_eval.tasks

from dijiang.convert import load_source
from dijiang.evaluate.quality import lm_eval_runner
from dijiang.evaluate.quality.lm_eval_runner import TASK_SETS, lm_eval_scores, load_tasks, resolve_tasks

FILES = Path(__file__).parent / "lm_eval_files"
CONTEXT = 64  # of the models of `pair`
WORDS = ["the", "cat", "sat", "on", "mat", "and", "rat"]


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def choice_documents(rng: random.Random, count: int) -> list[dict]:
    """Questions with two to four choices of different lengths."""
    documents = []
    for _ in range(count):
        choices = list({words(rng, 1, 4) for _ in range(4)} | {"cat", "mat on"})[: rng.randint(2, 4)]
        documents.append({"question": words(rng, 2, 6), "choices": choices, "answer": rng.randrange(len(choices))})
    return documents


def blank_documents(rng: random.Random, count: int) -> list[dict]:
    """Two contexts with the same end, after which a continuation is often about as likely."""
    documents = []
    for _ in range(count):
        end = words(rng, 3, 6)
        contexts = [f"{words(rng, 1, 3)} {end}" for _ in range(2)]
        documents.append({"contexts": contexts, "continuation": words(rng, 1, 3), "answer": rng.randrange(2)})
    return documents


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """write(name, documents) into the working folder; it holds seeded data for every task to begin with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)  # lists what is installed, slowly
    for module in (datasets.config, sys.modules["huggingface_hub.constants"]):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)

    def write(name: str, documents: list[dict]) -> list[dict]:
        Path(f"{name}.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in documents), encoding="utf-8")
        return documents

    rng = random.Random(3)
    write("examples", choice_documents(rng, 5))
    write("choices", choice_documents(rng, 23))
    write("blanks", blank_documents(rng, 11))
    write("continued", [{"question": words(rng, 2, 6), "answer": "cat"} for _ in range(7)])
    return write


def documents_of(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def loaded(tokenizer, *names: str, context: int = CONTEXT, **settings) -> list:
    """Tasks of these files."""
    found, manager = resolve_tasks([str(FILES / f"{name}.yaml") for name in names])
    return load_tasks(found, manager, tokenizer, context=context, **settings)


def by_hand(folder: Path, name: str, **settings) -> dict:
    """lm-eval as a user would run it on a checkpoint, by transformers' own classes."""
    with lm_eval_runner.quiet():
        manager = lm_eval.tasks.TaskManager(include_path=str(FILES), include_defaults=False)
        model_args = f"pretrained={folder},dtype=float32"
        options = {"model_args": model_args, "device": "cpu", "task_manager": manager, "bootstrap_iters": 0, **settings}
        return lm_eval.simple_evaluate(model="hf", tasks=[name], **options)


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """log p of the continuation, in nats."""
    whole, begin = tokenizer(context + continuation)["input_ids"], len(tokenizer(context)["input_ids"])
    log_p = model(torch.tensor([whole[:-1]]), use_cache=False).logits[0].float().log_softmax(-1)
    return sum(log_p[t - 1, whole[t]].item() for t in range(begin, len(whole)))


def right_by_loop(model, tokenizer, asked: list[list[tuple[str, str]]], answers: list[int]) -> list[float]:
    """For each document, whether the likeliest of its (context, continuation) is the answer."""
    found = []
    for pairs, answer in zip(asked, answers, strict=True):
        likelihoods = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
        found.append(float(likelihoods.index(max(likelihoods)) == answer))
    return found


@torch.no_grad()
def written_by_loop(model, tokenizer, prompt: str, *, steps: int, until: str) -> str:
    """Greedy continuation, every step without a cache."""
    ids = tokenizer(prompt)["input_ids"]
    begin = len(ids)
    for _ in range(steps):
        ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id or until in tokenizer.decode(ids[begin:], skip_special_tokens=True):
            break
    return tokenizer.decode(ids[begin:], skip_special_tokens=True).split(until)[0]


# --- scores ---


@pytest.mark.parametrize("which", ["teacher", "checkpoint"])
def test_choices_equal_lm_eval_by_hand_and_a_loop_without_it(pair, tokenizer, which):
    folder, done = getattr(pair, which), []
    model = load_source(folder)[0]
    (task,) = loaded(tokenizer, "choices")
    found = lm_eval_scores(model, tokenizer, task, batch_size=4, advance=done.append)
    assert found["metric"] == "acc" and found["weights"] == [1.0] * 23 and 0 < sum(found["totals"]) < 23
    documents = documents_of("choices")
    asked = [[(x["question"], f" {choice}") for choice in x["choices"]] for x in documents]
    assert found["totals"] == right_by_loop(model, tokenizer, asked, [x["answer"] for x in documents])
    theirs = by_hand(folder, "choices")
    assert found["totals"] == [x["acc"] for x in theirs["samples"]["choices"]]
    for key, value in found["aggregated"]["choices"].items():
        assert value == theirs["results"]["choices"][key]
    assert found["aggregated"]["choices"]["acc,none"] == pytest.approx(sum(found["totals"]) / 23)
    assert json.loads(json.dumps(found)) == found
    # what a model reads: each choice with its question
    tokens = sum(len(tokenizer(context + choice)["input_ids"]) for pairs in asked for context, choice in pairs)
    assert sum(done) == task.tokens == tokens


def test_examples_in_prompts_and_limit_equal_lm_eval_by_hand(pair, tokenizer):
    model, totals = load_source(pair.checkpoint)[0], set()
    for seed in (1234, 7):
        (task,) = loaded(tokenizer, "choices", num_fewshot=1, limit=13, seed=seed)
        assert task.settings["tasks"]["choices"]["num_fewshot"] == 1 and task.documents == 13
        theirs = by_hand(pair.checkpoint, "choices", num_fewshot=1, limit=13, fewshot_random_seed=seed)["samples"]["choices"]
        for _ in range(2):  # the second model is asked the same
            done = []
            found = lm_eval_scores(model, tokenizer, task, advance=done.append)
            assert found["totals"] == [x["acc"] for x in theirs] and sum(done) == task.tokens
        totals.add(task.settings["hash"])
    assert len(totals) == 2  # other examples


@pytest.mark.parametrize("which", ["teacher", "checkpoint"])
def test_generation_equals_lm_eval_by_hand_and_a_loop_without_it(pair, tokenizer, data, which):
    folder, rng = getattr(pair, which), random.Random(11)
    model, documents = load_source(folder)[0], []
    for i in range(12):  # every third answer is wrong
        prompt = words(rng, 1, 9)
        answer = written_by_loop(model, tokenizer, prompt, steps=6, until="t")
        documents.append({"question": prompt, "answer": answer if i % 3 else f"{answer} not"})
    assert len({x["answer"] for x in documents}) > 4
    data("continued", documents)
    (task,) = loaded(tokenizer, "continued")
    assert (task.metric, task.chance, task.better) == ("exact_match", 0.0, "higher")
    for batch_size in (1, 5):  # the prompts of a batch are padded on the left
        done = []
        found = lm_eval_scores(model, tokenizer, task, batch_size=batch_size, advance=done.append)
        assert found["totals"] == [float(i % 3 > 0) for i in range(12)]
        assert sum(done) == task.tokens == sum(len(tokenizer(x["question"])["input_ids"]) + 6 for x in documents)
    theirs = by_hand(folder, "continued")["samples"]["continued"]
    assert found["totals"] == [x["exact_match"] for x in theirs]


@pytest.mark.parametrize("seed", [0, 1])
def test_choices_of_contexts_and_padding(pair, tokenizer, data, seed):
    """Whatever stands beside a request in its batch."""
    model, documents = load_source(pair.checkpoint)[0], data("blanks", blank_documents(random.Random(seed), 17))
    (task,) = loaded(tokenizer, "blanks")
    asked = [[(context, f" {x['continuation']}") for context in x["contexts"]] for x in documents]
    expected = right_by_loop(model, tokenizer, asked, [x["answer"] for x in documents])
    assert 0 < sum(expected) < 17
    for batch_size in (1, 4):
        assert lm_eval_scores(model, tokenizer, task, batch_size=batch_size)["totals"] == expected


def test_near_ties_in_bfloat16_are_told_apart_in_float32(pair, tokenizer, data):
    model, near = load_source(pair.checkpoint, dtype=torch.bfloat16)[0], []
    for document in blank_documents(random.Random(5), 200):
        pairs = [(context, f" {document['continuation']}") for context in document["contexts"]]
        first, second = (log_likelihood(model, tokenizer, *pair) for pair in pairs)
        if first != second:
            near.append((abs(first - second), document | {"answer": int(second > first)}))
    near = sorted(near, key=lambda x: x[0])[:15]
    assert near[-1][0] < 0.3  # nats, of which bfloat16 tells eighths apart from 16 on, and quarters from 32
    data("blanks", [document for _, document in near])
    (task,) = loaded(tokenizer, "blanks")
    assert lm_eval_scores(model, tokenizer, task, batch_size=1)["totals"] == [1.0] * 15


def test_the_model_and_the_tokenizer_stay_as_they_are(pair, tokenizer):
    model = load_source(pair.checkpoint, dtype=torch.bfloat16)[0]
    before = {name: (tensor.data_ptr(), tensor.dtype, tensor.clone()) for name, tensor in model.state_dict().items()}
    config, vocabulary = model.config.to_dict(), len(tokenizer)
    for task in loaded(tokenizer, "choices", "continued", limit=3):
        lm_eval_scores(model, tokenizer, task, batch_size=2)
    for name, tensor in model.state_dict().items():
        pointer, dtype, value = before[name]
        assert tensor.data_ptr() == pointer and tensor.dtype == dtype and torch.equal(tensor, value)
    assert model.config.to_dict() == config and not model.training
    assert tokenizer.pad_token is None and len(tokenizer) == vocabulary


# --- groups ---


def test_groups_give_lm_evals_own_mean(pair, tokenizer):
    model = load_source(pair.checkpoint)[0]
    by_task, by_document = loaded(tokenizer, "by_task", "by_document")
    single = {task.name: lm_eval_scores(model, tokenizer, task)["totals"] for task in loaded(tokenizer, "choices", "blanks")}
    means = {name: sum(totals) / len(totals) for name, totals in single.items()}
    assert means["choices"] != means["blanks"]

    found = lm_eval_scores(model, tokenizer, by_document)
    assert found["totals"] == single["choices"] + single["blanks"] and found["weights"] == [1.0] * 34
    assert found["aggregated"]["by_document"]["acc,none"] == pytest.approx(sum(found["totals"]) / 34)
    assert found["aggregated"]["blanks"]["acc,none"] == pytest.approx(means["blanks"])

    found = lm_eval_scores(model, tokenizer, by_task)
    assert sum(found["totals"]) / sum(found["weights"]) == pytest.approx((means["choices"] + means["blanks"]) / 2)
    assert found["totals"] == pytest.approx([x / 23 for x in single["choices"]] + [x / 11 for x in single["blanks"]])
    own = by_hand(pair.checkpoint, "by_task")["results"]["by_task"]["acc,none"]
    assert found["aggregated"]["by_task"]["acc,none"] == own == pytest.approx(sum(found["totals"]) / 2)

    guess = sum(1 / len(x["choices"]) for x in documents_of("choices"))
    assert by_document.chance == pytest.approx((guess + 11 / 2) / 34)
    assert by_task.chance == pytest.approx((guess / 23 + 1 / 2) / 2)


def test_a_group_without_a_mean_becomes_its_parts(tokenizer):
    assert [task.name for task in loaded(tokenizer, "no_mean")] == ["by_task", "continued"]


# --- what is counted before a model is loaded ---


def test_documents_that_do_not_fit_are_counted(pair, tokenizer, data, monkeypatch, caplog):
    """
    At the limit nothing is cut: the last token is only predicted, and what is generated needs room. Where something is,
    lm-eval says so to its log.
    """
    monkeypatch.setattr(lm_eval_runner, "quiet", nullcontext)
    model = load_source(pair.teacher)[0]
    choices = [" cat", " mat on"]
    longest = max(len(tokenizer(choice)["input_ids"]) for choice in choices)
    for extra, truncated in ((0, 0), (1, 1)):
        question = tokenizer.decode([5] * (CONTEXT + 1 - longest + extra))
        assert len(tokenizer(question)["input_ids"]) == CONTEXT + 1 - longest + extra
        long = {"question": question, "choices": [x[1:] for x in choices], "answer": 0}
        data("choices", [*choice_documents(random.Random(0), 4), long])
        data("continued", [{"question": question[: CONTEXT - 6 + extra], "answer": "x"}, {"question": "the", "answer": "x"}])
        for task in loaded(tokenizer, "choices", "continued"):
            assert task.truncated == truncated
            caplog.clear()
            found = lm_eval_scores(model, tokenizer, task, batch_size=2)
            assert ("runcati" in caplog.text) == bool(truncated)
            assert found["truncated"] == truncated and len(found["totals"]) == task.documents


def test_settings_tell_what_scores_depend_on(tokenizer, data):
    (first,), (again,) = loaded(tokenizer, "choices"), loaded(tokenizer, "choices")
    assert first.settings == again.settings == json.loads(json.dumps(first.settings))
    documents = documents_of("choices")
    documents[3]["answer"] = (documents[3]["answer"] + 1) % len(documents[3]["choices"])
    data("choices", documents)
    assert loaded(tokenizer, "choices")[0].settings["hash"] != first.settings["hash"]
    assert loaded(tokenizer, "choices", limit=3)[0].settings["hash"] != first.settings["hash"]


def test_settings_tell_how_answers_are_scored(tokenizer, data, tmp_path):
    def hash_with(**changed) -> str:
        content = yaml.safe_load((FILES / "continued.yaml").read_text(encoding="utf-8")) | changed
        path = tmp_path / "changed" / "continued.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        found, manager = resolve_tasks([str(path)])
        return load_tasks(found, manager, tokenizer, context=CONTEXT)[0].settings["hash"]

    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    hashes = [
        hash_with(metric_list=[exact]),
        hash_with(metric_list=[exact]),
        hash_with(metric_list=[exact | {"ignore_case": True}]),
    ]
    hashes.append(hash_with(metric_list=[exact], filter_list=[{"name": "first", "filter": [{"function": "take_first"}]}]))
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_a_template_that_cannot_be_filled_in_is_refused(tokenizer, data, tmp_path):
    content = yaml.safe_load((FILES / "choices.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "broken" / "choices.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(content | {"doc_to_choice": "{{nowhere.nothing}}"}), encoding="utf-8")
    found, manager = resolve_tasks([str(path)])
    message = r"^the prompts of the task choices cannot be made \(.*\); fix its file$"
    with pytest.raises(ValueError, match=message):
        load_tasks(found, manager, tokenizer, context=CONTEXT)


# --- names ---


# lm-eval's own folders of the tasks in `TASK_SETS`; to index all of them takes many seconds
SHIPPED = ("piqa", "winogrande", "super_glue", "arc", "logiqa", "siqa", "hellaswag", "mmlu/default", "nq_open", "race")


@pytest.fixture(scope="module")
def library():
    root = Path(lm_eval.tasks.__file__).parent
    with lm_eval_runner.quiet():
        return lm_eval.tasks.TaskManager(include_path=[root / name for name in SHIPPED], include_defaults=False)


@pytest.fixture
def indexed(library, monkeypatch):
    def made(*, include_path, include_defaults):
        assert include_defaults and not include_path
        return library

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", made)


def test_sets_are_in_lm_evals_own_names(indexed):
    names, manager = resolve_tasks(["paper", "arc_easy", "paper-7b"])
    assert names == list(TASK_SETS["paper-7b"]) and names[:6] == list(TASK_SETS["paper"])
    assert set(names) <= {*manager.all_subtasks, *manager.all_groups}
    # none has a script of its own run, which `datasets` does no more
    for name in names:
        config = manager.task_index[name].cfg
        assert not (config.get("dataset_kwargs") or {}).get("trust_remote_code")


def test_unknown_names_are_refused_with_similar_ones(indexed, refused, tmp_path):
    message = r"^lm-eval has no task 'winogrand' \(similar: .*winogrande.*\); `lm-eval ls tasks` lists them, or give a YAML"
    refused(tmp_path, lambda: resolve_tasks(["piqa", "winogrand"]), message)
    refused(tmp_path, lambda: resolve_tasks(["paper-70b"]), r"\(similar: paper-7b.*paper")
    refused(
        tmp_path,
        lambda: resolve_tasks(["piqa", "no/such.yaml"]),
        r"^there is no file no/such.yaml; give the path of a task file",
    )


def test_data_out_of_reach_is_refused_by_task_and_data_set(indexed, tokenizer, refused, tmp_path):
    piqa, mmlu = r"piqa \(data set baber/piqa\)", r"mmlu \(its part mmlu_\w+\) \(data set cais/mmlu\)"
    for name, named in (("piqa", piqa), ("mmlu", mmlu)):
        message = (
            rf"^the task {named} cannot be loaded: .*(reach|offline).*; load it once with the network at hand, .* it out$"
        )
        refused(tmp_path, lambda name=name: load_tasks(*resolve_tasks([name]), tokenizer, context=CONTEXT), message)


def test_data_of_a_file_out_of_reach_is_refused(tokenizer, refused, tmp_path):
    message = r"^the task far_away \(data set nobody/has-this-data\) cannot be loaded: "
    refused(tmp_path, lambda: loaded(tokenizer, "far_away"), message)


def test_a_file_that_is_no_task_is_refused(refused, tmp_path):
    for name, text in (("list", "[1, 2]"), ("nameless", "dataset_path: json"), ("a", "task: twin"), ("b", "task: twin")):
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    assert resolve_tasks([str(tmp_path / "a.yaml")])[0] == ["twin"]
    for name in ("list", "nameless", "b"):
        path = tmp_path / f"{name}.yaml"
        message = rf"^{path} defines no task that lm-eval can read, or one by a name .*; it needs a line `task: NAME`$"
        refused(tmp_path, lambda path=path: resolve_tasks([str(path)]), message)


def test_a_task_without_a_mean_over_documents_is_refused(tokenizer, refused, tmp_path):
    message = r"^the task rolling has no metric that is a mean over documents \(it has word_perplexity\); leave it out$"
    loaded(tokenizer, "continued")  # its data is read
    with pytest.raises(ValueError, match=message):
        loaded(tokenizer, "rolling")


def test_a_generation_longer_than_the_context_is_refused(tokenizer):
    loaded(tokenizer, "continued", context=7)
    with pytest.raises(ValueError, match=r"^the task continued asks for 6 new tokens and the context is 6; leave it out$"):
        loaded(tokenizer, "continued", context=6)


def test_without_lm_eval_or_its_library(refused, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(lm_eval_runner, "find_spec", lambda name: None)
        message = r"^these tasks run by lm_eval and accelerate, missing here; run: pip install 'dijiang\[eval\]'$"
        refused(tmp_path, lambda: resolve_tasks(["piqa"]), message)
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    repository = Path(lm_eval_runner.__file__).parents[2]
    monkeypatch.syspath_prepend(str(repository))  # as `python -m dijiang` in the repository does
    message = (
        rf"^lm-eval needs the library `evaluate`, and Python finds the folder {repository}/evaluate in its place; start from"
    )
    refused(tmp_path, lambda: resolve_tasks(["piqa"]), message)


def test_nothing_is_printed_and_what_was_silenced_speaks_again(pair, tokenizer, capfd):
    import logging

    from tqdm import tqdm

    model, before = load_source(pair.checkpoint)[0], (logging.getLogger("lm_eval").level, tqdm.__init__)
    capfd.readouterr()
    for task in loaded(tokenizer, "choices", "continued", limit=2):
        lm_eval_scores(model, tokenizer, task)
    assert capfd.readouterr() == ("", "")
    assert (logging.getLogger("lm_eval").level, tqdm.__init__) == before

    def fail_in_silence():
        with lm_eval_runner.quiet():
            logging.getLogger("lm_eval").error("errors are still shown")
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_silence()
    assert (logging.getLogger("lm_eval").level, tqdm.__init__) == before
