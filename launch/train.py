"""Train a recipe with DeepSpeed.

    deepspeed --num_gpus 2 launch/train.py --deepspeed_config ds_configs/cpu.json --recipe vit_llama.demo

The same command again continues the run from its last checkpoint.
"""

if __name__ == "__main__":  # loader processes import this file again: it must do nothing for them
    from vlm.run.command import finish, train_main

    finish(train_main())
