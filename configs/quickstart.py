"""A first model in a few minutes on two CPU cores: `make quickstart`.

Deep, thin and layer-shared like MobileLLM-LS, scaled down: 6 blocks of width 128, each run twice.
"""

from mobilellm_jax.training.run_config import default_config


def get_config():
    config = default_config()
    config.model.update(
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=128,
        ffn_dim=384,
        head_dim=32,
        vocab_size=2048,
        max_seq_len=256,
        sharing="immediate",
        num_repeats=2,
    )
    config.train.num_steps = 400
    config.train.global_batch_size = 8
    config.optimizer.peak_lr = 4e-3
    config.optimizer.warmup_steps = 40
    config.log.every_steps = 10
    config.eval.every_steps = 100
    config.eval.num_records = 64
    config.checkpoint.every_steps = 100
    return config
