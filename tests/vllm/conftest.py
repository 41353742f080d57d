"""What tests of the vLLM plugin share. `make test-vllm` runs them in an environment of their own, with vLLM for CPUs.

Engines run one after the other in a process beside pytest's (engine_process.py): vLLM pins threads.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]  # in the environment of `make test` they are not its

ENV = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONPATH": os.pathsep.join(
        [str(Path(__file__).with_name("startup")), *filter(None, [os.environ.get("PYTHONPATH")])]
    ),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two test files run side by side: vLLM would put both engines on one core
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
SMALL = {  # arguments of the engine in every test
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 128 << 20,
    "max_model_len": 1024,
    "disable_log_stats": False,
}


class EngineError(AssertionError):
    """The engine's process failed; the message is what it wrote."""


def _run(args, env, stdin=None, timeout=240):
    p = subprocess.Popen(
        args, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = p.communicate(stdin, timeout)
    except subprocess.TimeoutExpired:
        raise EngineError(f"no result after {timeout} s") from None
    finally:
        _end(p.pid)
        p.wait()
    return p.returncode, out, err


def _end(pid):
    """End what is left of a process group that this file started."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


class Process:
    """engine_process.py, running."""

    def __init__(self, folder, env):
        self.folder, self.count, self.log = folder, 0, folder / "log"
        script = Path(__file__).with_name("engine_process.py")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(script)], env=os.environ | ENV | env, text=True, stdin=subprocess.PIPE,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def run(self, job, timeout):
        self.count += 1
        out, end = self.folder / f"{self.count}.json", time.monotonic() + timeout
        self.process.stdin.write(json.dumps(job | {"out": str(out)}) + "\n")
        self.process.stdin.flush()
        while not out.exists():
            if self.process.poll() is not None or time.monotonic() > end:
                self.end()
                raise EngineError(f"no result within {timeout} s:\n{self.log.read_text()[-12000:]}")
            time.sleep(0.02)
        found = json.loads(out.read_text())
        if "error" in found:
            raise EngineError(f"{self.log.read_text()[-4000:]}\n{found['error']}")
        return found["result"]

    def end(self):
        _end(self.process.pid)
        self.process.wait()


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """engine(code, model, recipe=None, env={}, llm={}, **params) -> what `code` puts into `result`.

    The code runs in the process of engine_process.py, one for all tests, or with `env` in one of its own. With
    model=None it makes its engines itself.
    """
    shared = []

    def run(code, model, recipe=None, env=None, llm=None, timeout=600, **params):
        options = None if model is None else {"model": str(model), "recipe": recipe} | (llm or {})
        job = {"code": textwrap.dedent(code), "llm": options, "small": SMALL, "params": params}
        if env:
            own = Process(tmp_path_factory.mktemp("engines"), env)
            try:
                return own.run(job, timeout)
            finally:
                own.end()
        if not shared or shared[-1].process.poll() is not None:
            shared.append(Process(tmp_path_factory.mktemp("engines"), {}))
        return shared[-1].run(job, timeout)

    run.Error = EngineError
    yield run
    for process in shared:
        process.end()


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf):
    """SmolLM2-135M-Instruct as a folder in bf16, made once an environment."""
    folder = Path(sys.prefix) / "models" / "smollm2"
    if not folder.exists():
        part = folder.with_name(f"smollm2.{os.getpid()}")
        code = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
file = dict(gguf_file={smollm2_gguf.name!r})
how = dict(quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16)
AutoModelForCausalLM.from_pretrained({str(smollm2_gguf.parent)!r}, **file, **how).save_pretrained({str(part)!r})
AutoTokenizer.from_pretrained({str(smollm2_gguf.parent)!r}, **file).save_pretrained({str(part)!r})
"""
        status, _, err = _run([sys.executable, "-c", code], os.environ | ENV)
        assert status == 0, err
        try:
            os.replace(part, folder)
        except OSError:  # the other process was faster
            assert folder.exists()
            shutil.rmtree(part)
    return folder


def _tiny(folder, name, **config):
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {
        "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.1, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    made = getattr(transformers, f"{name}Config")(**(shape | config))
    getattr(transformers, f"{name}ForCausalLM")(made).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A random Llama of 4 heads over 2, two layers, with biases; no tokenizer (skip_tokenizer_init)."""
    folder = tmp_path_factory.mktemp("llama")
    return _tiny(folder, "Llama", intermediate_size=256, head_dim=32, attention_bias=True)


@pytest.fixture(scope="session")
def chat_llama(tmp_path_factory, smollm2):
    """The same with SmolLM2's tokenizer."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chat")
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return _tiny(folder, "Llama", intermediate_size=256, head_dim=32, attention_bias=True, vocab_size=49152)


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory):
    """A random OLMoE of 8 experts, 2 a token."""
    return _tiny(tmp_path_factory.mktemp("olmoe"), "Olmoe", intermediate_size=64, num_experts=8, num_experts_per_tok=2)


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """packed(model, recipe, **options) -> a folder as `turboquant quantize` writes it, in float32."""
    made = {}

    def make(model, recipe, **options):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from turboquant import TurboQuantConfig

        key = (str(model), recipe, str(options))
        if key not in made:
            made[key] = folder = tmp_path_factory.mktemp("packed")
            config = TurboQuantConfig(recipe, **options)
            net = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32)
            net.save_pretrained(folder)
            if (Path(model) / "tokenizer.json").exists():
                AutoTokenizer.from_pretrained(model).save_pretrained(folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def transformers_logprobs():
    """transformers_logprobs(model, recipe, ids): of each token after the first, float32; recipe None for the model.

    Norms and MLPs run in torch, layer by layer, as in vLLM. With length=N of pieces of N ids, each by itself.
    """

    def run(model, recipe, ids, length=None, **options):
        import torch
        from transformers import AutoModelForCausalLM

        from turboquant import TurboQuantConfig
        from turboquant.layers.fuse import unfuse

        how = {} if recipe is None else {"quantization_config": TurboQuantConfig(recipe, **options)}
        net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **how).eval()
        unfuse(net)
        x = torch.tensor(ids).view(-1, length or len(ids))
        with torch.no_grad():
            return net(x).logits[:, :-1].float().log_softmax(-1).gather(2, x[:, 1:, None]).flatten().tolist()

    return run


def _get(url, timeout=10):
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return answer.read().decode()


@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    """with serve(*args) as (url, get): `turboquant serve ARGS`, healthy; get(path) -> text. `path`: of its imports."""

    @contextmanager
    def start(*args, env=None, path=(), patience=400):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        log = tmp_path_factory.mktemp("server") / "log"
        first, more = (args[: args.index("--")], args[args.index("--") :]) if "--" in args else (args, ())
        command = [sys.executable, "-m", "turboquant.cli", "serve", *first, "--port", str(port), "--host", "127.0.0.1"]
        base = os.environ | ENV | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | (env or {})
        base["PYTHONPATH"] = os.pathsep.join([*map(str, path), base["PYTHONPATH"]])
        with log.open("w") as file:
            p = subprocess.Popen(
                [*command, *more], env=base, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + patience
            while True:
                if p.poll() is not None or time.monotonic() > end:
                    raise EngineError(f"the server did not start:\n{log.read_text()[-12000:]}")
                try:
                    _get(f"{url}/health")
                    break
                except OSError:
                    time.sleep(0.5)
            yield url, lambda path: _get(url + path)
        finally:
            p.terminate()
            with suppress(subprocess.TimeoutExpired):
                p.wait(20)
            _end(p.pid)
            p.wait()

    start.Error = EngineError
    return start
