"""The stages pretrain, sft, reward and dpo: transformers.Trainer inside Ray Train, or inline.

Read `training` first (what a stage gives to its training processes), then `sft`, the simplest
whole stage; `launcher` has `ray_train` train in `processes`, and `trainer` runs in each. Only
`reward_benchmark` uses another stage's folder: the scorers of `stages.ppo`.
"""
