"""Evaluate a checkpoint of a recipe on its test shards.

    deepspeed --num_gpus 2 launch/evaluate.py --deepspeed_config ds_configs/cpu.json --recipe vit_llama.demo \
        --checkpoint runs/demo/vit_llama run_dir=runs/demo/again
"""

if __name__ == "__main__":  # loader processes import this file again: it must do nothing for them
    from vlm.run.command import evaluate_main, finish

    finish(evaluate_main())
