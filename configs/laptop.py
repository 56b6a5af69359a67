"""Under an hour on two CPU cores: 10.9M parameters, 12 blocks of width 192, each run twice.

  mobilellm prepare --input corpus/*.jsonl --tokenizer tokenizer.model --sequence_length 512 \\
      --valid_fraction 0.02 --output data/corpus
  mobilellm train --config configs/laptop.py --workdir runs/laptop --config.data.path=data/corpus

With a 32,000-piece tokenizer such as LLaMA's; see docs/real_run.md for what comes out.
"""

from mobilellm_jax.training.run_config import default_config


def get_config():
    config = default_config()
    config.model.update(
        num_layers=12,
        num_heads=3,
        num_kv_heads=1,
        embed_dim=192,
        ffn_dim=512,
        max_seq_len=2048,
        sharing="immediate",
        num_repeats=2,
    )
    config.train.num_steps = 1200
    config.train.global_batch_size = 4
    config.optimizer.peak_lr = 3e-3
    config.optimizer.warmup_steps = 100
    config.log.every_steps = 10
    config.eval.every_steps = 200
    config.eval.num_records = 128
    config.checkpoint.every_steps = 100
    return config
