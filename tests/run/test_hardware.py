"""The DeepSpeed JSON is checked to the last nested key, before anything is built."""

import json
import subprocess
import sys

import pytest

from vlm.run import hardware
from vlm.run.hardware import read_hardware, read_json
from vlm.types import UserError


def written(tmp_path, change):
    path = tmp_path / "hardware.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, **change}))
    return path


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"train_batch_size": 8}, ["global_batch_size"]),
        ({"gradient_clipping": 1.0}, ["optim.max_grad_norm"]),
        ({"optimizer": {"type": "Adam"}}, ["optim"]),
        ({"zero_optimisation": {"stage": 2}}, ["'zero_optimization'"]),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, ["zero_optimization.reduce_bucket_size"]),
        ({"data_types": {"keep_in_fp32_modules": ["a", "auto"]}}, ["data_types.keep_in_fp32_modules.1", "auto"]),
        ({"train_micro_batch_size_per_gpu": "auto"}, ["auto"]),
        ({"train_micro_batch_size_per_gpu": 0}, ["above 0"]),
        ({"train_micro_batch_size_per_gpu": True}, ["True"]),
        ({"fp16": {"enabled": True}}, ["bf16"]),
        ({"comms_logger": {"enabled": True}}, ["not supported", "wall_clock_breakdown"]),
        ({"aio": {"bogus": 1}}, ["not supported", "nvme"]),
        ({"data_types": {"grad_accum_dtypee": "fp32"}}, ["data_types.grad_accum_dtypee", "'grad_accum_dtype'"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["data_types.grad_accum_dtype", "fp32"]),
        ({"flops_profiler": {"bogus": 1}}, ["flops_profiler.bogus", "profile_step"]),
        ({"flops_profiler": {"profile_step": 0}}, ["flops_profiler.profile_step is 0", "above 0"]),
        ({"communication_data_type": "fp99"}, ["communication_data_type", "fp99", "bf16"]),
        ({"wall_clock_breakdown": "yes please"}, ["wall_clock_breakdown", "yes please", "true or false"]),
        ({"log_level": "warn"}, ["warn", "warning"]),
        ({"gradient_predivide_factor": float("nan")}, ["nan", "above 0"]),
        ({"zero_optimization": 3}, ["zero_optimization is 3", "object"]),
        ({"bf16": True}, ["bf16 is True", "object"]),
        ({"bf16": {"enabledd": True}}, ["bf16.enabledd", "'enabled'"]),
        ({"bf16": {"enabled": "yes"}}, ["bf16.enabled", "yes", "true or false"]),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, ["not supported", "fp32"]),
        ({"zero_optimization": {"stage": 7}}, ["zero_optimization.stage is 7", "0, 1, 2 or 3"]),
        ({"zero_optimization": {"stage": True}}, ["zero_optimization.stage", "True"]),
        ({"zero_optimization": {"reduce_buckt_size": 1}}, ["reduce_buckt_size", "'reduce_bucket_size'"]),
        ({"zero_optimization": {"stage3_prefetch_size": 1}}, ["'stage3_prefetch_bucket_size'"]),
        ({"zero_optimization": {"reduce_bucket_size": 0.5}}, ["zero_optimization.reduce_bucket_size is 0.5"]),
        ({"zero_optimization": {"reduce_bucket_size": "5"}}, ["reduce_bucket_size", "a number"]),
        ({"zero_optimization": {"cpu_offload": True}}, ["cpu_offload", "offload_optimizer"]),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, ["compute_grad_norm", "gradient norm"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"devic": "cpu"}}}, ["optimizer.devic", "'device'"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["offload_param.device", "cpu"]),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["needs stage 3", "is 2"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["needs stage 1"]),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, ["Stage 3"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"super_offload": True}}}, ["super_offload"]),
        ({"zero_optimization": {"stage": 1}, "prescale_gradients": True}, ["prescale_gradients", "reduce_scatter"]),
        ({"zero_optimization": {"stage": 2}, "gradient_predivide_factor": 2.0}, ["reduce_scatter"]),
        ({"csv_monitor": {"folder": "x"}}, ["csv_monitor.folder", "output_path"]),
    ],
)  # fmt: skip
def test_bad_json_is_refused_with_place_value_and_mend(tmp_path, change, parts):
    path = written(tmp_path, change)
    with pytest.raises(UserError) as caught:
        read_hardware(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "change",
    [
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": None, "offload_optimizer": None}},
        {"zero_optimization": {"stage": 3, "prefetch_bucket_size": 10, "offload_param": {"device": "cpu"}}},
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp32"}},
        {"flops_profiler": {"enabled": True, "module_depth": -1, "output_file": None, "recompute_fwd_factor": 0.5}},
        {"csv_monitor": {"enabled": True, "output_path": "a", "job_name": "b"}, "communication_data_type": "fp32"},
        {"wall_clock_breakdown": True, "memory_breakdown": False, "log_level": "info", "gradient_predivide_factor": 2},
    ],
)
def test_good_json_is_returned_as_it_stands(tmp_path, change):
    assert read_hardware(written(tmp_path, change)) == {"train_micro_batch_size_per_gpu": 4, **change}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{\n"a": 1,\n}', r"bad\.json: line 3"),
        ("[1]", "holds list"),
        ("{}", "train_micro_batch_size_per_gpu is missing"),
        ('{"bf16": {}, "bf16": {}}', "'bf16' stands twice"),
    ],
)
def test_unreadable_json_names_file_and_line(tmp_path, text, part):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UserError, match=part):
        read_json(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path / "none.json")


def test_a_monitor_that_is_not_installed_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        read_hardware(written(tmp_path, {"tensorboard": {"enabled": True}}))


def test_the_first_look_at_a_json_loads_neither_torch_nor_deepspeed():
    code = "import sys, vlm.run.hardware; sys.exit(bool({'torch', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
