"""The names of other systems for our keys, a line each: theirs, ours, and what to mind.

Names are those of TRL 0.11 to 1.16 (trainer configs and scripts; the supervised trainers apart), of
OpenRLHF 0.5 to 0.11 (flat and dotted flags) and of verl 0.3 to 0.6 (`ppo_trainer.yaml`).
``{stage}`` stands for the supervised stage that is configured.
"""

TRL = """
model_name_or_path                model.path
sft_model_path                    sft.path
reward_model_path                 reward.path
model_name                        model.path
torch_dtype                       model.dtype
load_in_8bit                      model.quantization               int8
load_in_4bit                      model.quantization               nf4
use_peft                          lora                             PPO always trains an adapter
lora_r                            lora.r
lora_alpha                        lora.alpha
lora_dropout                      lora.dropout
lora_target_modules               lora.target_modules
dataset_name                      data.prompts                     pairs: data.preferences, SFT: data.sft
steps                             ppo.iterations                   here one iteration is one batch of rollouts
total_episodes                    ppo.iterations                   episodes are iterations x ppo.batch_size
num_train_epochs                  ppo.iterations                   prompts are drawn anew when all were used
per_device_train_batch_size       ppo.mini_batch_size              theirs is of one device, ours of all together
gradient_accumulation_steps       ppo.max_tokens_per_micro_batch   ours limits tokens, and accumulates as needed
num_mini_batches                  ppo.mini_batch_size              ours is the size, not the number
local_rollout_forward_batch_size  ppo.max_tokens_per_micro_batch   ours counts tokens
num_ppo_epochs                    ppo.epochs
ppo_epochs                        ppo.epochs
num_iterations                    ppo.epochs
num_generations                   ppo.samples_per_prompt
init_kl_coef                      ppo.kl_coef
adap_kl_ctrl                      ppo.kl_target                    null: a fixed coefficient
target                            ppo.kl_target                    nats a response
horizon                           ppo.kl_horizon
lam                               ppo.gae_lambda
cliprange                         ppo.clip_range
epsilon                           ppo.clip_range
cliprange_value                   ppo.value_clip_range
vf_coef                           critic.learning_rate             the critic has an optimizer of its own, so no weight
response_length                   rollout.max_tokens
max_new_tokens                    rollout.max_tokens
max_completion_length             rollout.max_tokens
min_new_tokens                    rollout.min_tokens
output_min_length                 rollout.length_sampler           min
output_max_length                 rollout.length_sampler           max, never drawn itself
missing_eos_penalty               ppo.missing_eos_penalty
max_prompt_length                 rollout.max_prompt_tokens
use_vllm                          rollout.engine                   vllm
vllm_mode                         placement.turns                  generators are processes of their own; colocate: they share GPUs by turns
vllm_enable_sleep_mode            placement.turns                  generators and learners
vllm_tensor_parallel_size         generators.tensor_parallel_size
vllm_gpu_memory_utilization       rollout.engine_args              {gpu_memory_utilization: 0.9}
log_with                          trackers                         a section for each tracker
report_to                         trackers                         a section for each tracker
tracker_project_name              trackers.wandb.project
log_completions                   trackers.completions_every       completions.jsonl is always written
output_dir                        run.dir
run_name                          run.name
save_steps                        ppo.save_every                   iterations
eval_steps                        ppo.eval_every                   iterations
save_total_limit                  ppo.keep_checkpoints
resume_from_checkpoint            run.resume                       auto: the same command goes on
dataset_config                    data.prompts.name
completion_only_loss              sft.loss_on                      completion
assistant_only_loss               sft.loss_on                      assistant
top_k                             rollout.top_k                    0: all tokens
dataset_train_split               data.prompts.split
reward_funcs                      rewards                          {type: function, function: module:name}
reward_weights                    rewards                          weight of each source
chat_template_kwargs              template.kwargs
kl_penalty                        ppo.kl_estimator                 kl: k1, mse: k2
beta                              ppo.kl_coef                      GRPO's: with kl_in: loss and kl_estimator: k3
epsilon_high                      ppo.clip_range_high
ratio_threshold                   guards.ratio.max_mean
delta                             ppo.dual_clip
vllm_importance_sampling_cap      ppo.importance_cap
"""  # noqa: E501

TRL_SUPERVISED = """
per_device_train_batch_size  {stage}.batch_size           theirs is of one device, ours of all together
gradient_accumulation_steps  {stage}.trainer              ours divides {stage}.batch_size by it
num_train_epochs             {stage}.epochs
max_steps                    {stage}.steps
lr_scheduler_type            {stage}.scheduler            cosine_with_min_lr: cosine, with {stage}.final_lr_share
warmup_ratio                 {stage}.warmup_share
eval_strategy                {stage}.eval_every           steps or epoch
eval_steps                   {stage}.eval_every
report_to                    trackers                     a section for each tracker
output_dir                   run.dir
max_length                   model.max_length
max_seq_length               model.max_length
packing                      {stage}.packing              isolate or concat; false: none
center_rewards_coefficient   reward.centre
loss_type                    dpo.loss
model_name_or_path           model.path
dataset_name                 data                         data.pretrain, data.sft or data.preferences
lora_r                       {stage}.lora.r
lora_alpha                   {stage}.lora.alpha
lora_dropout                 {stage}.lora.dropout
lora_target_modules          {stage}.lora.target_modules
dataset_config               data.sft.name
dataset_train_split          data.sft.split
chat_template_kwargs         template.kwargs
use_peft                     {stage}.tuning               lora, the default
"""  # noqa: E501

OPENRLHF = """
pretrain                             model.path                       with sft in run.stages; a finished one: sft.path
actor.model_name_or_path             model.path                       with sft in run.stages; a finished one: sft.path
reward_pretrain                      reward.path
reward.model_name_or_path            reward.path
critic_pretrain                      critic.path
critic.model_name_or_path            critic.path
prompt_data                          data.prompts
data.prompt_dataset                  data.prompts
eval_dataset                         data.eval
input_key                            data.prompts.columns             {prompt: their column}
data.input_key                       data.prompts.columns             {prompt: their column}
max_samples                          data.prompts.limit
data.max_samples                     data.prompts.limit
max_len                              model.max_length
data.max_len                         model.max_length
prompt_max_len                       rollout.max_prompt_tokens
generate_max_len                     rollout.max_tokens
rollout.max_new_tokens               rollout.max_tokens
n_samples_per_prompt                 ppo.samples_per_prompt
rollout.n_samples_per_prompt         ppo.samples_per_prompt
rollout_batch_size                   ppo.batch_size                   theirs counts prompts, ours rollouts
rollout.batch_size                   ppo.batch_size                   theirs counts prompts, ours rollouts
train_batch_size                     ppo.mini_batch_size
train.batch_size                     ppo.mini_batch_size
micro_train_batch_size               ppo.max_tokens_per_micro_batch   ours counts tokens
train.micro_batch_size               ppo.max_tokens_per_micro_batch   ours counts tokens
micro_rollout_batch_size             ppo.max_tokens_per_micro_batch   ours counts tokens
rollout.micro_batch_size             ppo.max_tokens_per_micro_batch   ours counts tokens
train_max_tokens_per_gpu             ppo.max_tokens_per_micro_batch
train.max_tokens_per_gpu             ppo.max_tokens_per_micro_batch
max_epochs                           ppo.epochs
train.max_epochs                     ppo.epochs
num_episodes                         ppo.iterations                   theirs are passes over the prompts
train.num_episodes                   ppo.iterations                   theirs are passes over the prompts
actor_learning_rate                  ppo.learning_rate
actor.adam.lr                        ppo.learning_rate
critic_learning_rate                 critic.learning_rate
critic.adam.lr                       critic.learning_rate
max_norm                             ppo.max_grad_norm
eps_clip                             ppo.clip_range
actor.eps_clip                       ppo.clip_range
value_clip                           ppo.value_clip_range
critic.value_clip                    ppo.value_clip_range
lambd                                ppo.gae_lambda
algo.advantage.lambd                 ppo.gae_lambda
algo.advantage.gamma                 ppo.gamma
advantage_estimator                  ppo.advantage  group_norm: grpo
algo.advantage.estimator             ppo.advantage  group_norm: grpo
init_kl_coef                         ppo.kl_coef
algo.kl.init_coef                    ppo.kl_coef
kl_target                            ppo.kl_target                    ours in nats a response
algo.kl.target                       ppo.kl_target                    ours in nats a response
kl_horizon                           ppo.kl_horizon
algo.kl.horizon                      ppo.kl_horizon
actor_num_nodes                      policy.num_ranks                 nodes x GPUs of a node
actor_num_gpus_per_node              policy.num_ranks                 nodes x GPUs of a node
actor.num_nodes                      policy.num_ranks                 nodes x GPUs of a node
actor.num_gpus_per_node              policy.num_ranks                 nodes x GPUs of a node
critic_num_nodes                     critic.num_ranks                 nodes x GPUs of a node
critic_num_gpus_per_node             critic.num_ranks                 nodes x GPUs of a node
critic.num_nodes                     critic.num_ranks                 nodes x GPUs of a node
critic.num_gpus_per_node             critic.num_ranks                 nodes x GPUs of a node
ref_num_nodes                        reference.num_workers            nodes x GPUs of a node
ref_num_gpus_per_node                reference.num_workers            nodes x GPUs of a node
ref.num_nodes                        reference.num_workers            nodes x GPUs of a node
ref.num_gpus_per_node                reference.num_workers            nodes x GPUs of a node
reward_num_nodes                     reward.num_workers               nodes x GPUs of a node
reward_num_gpus_per_node             reward.num_workers               nodes x GPUs of a node
reward.num_nodes                     reward.num_workers               nodes x GPUs of a node
reward.num_gpus_per_node             reward.num_workers               nodes x GPUs of a node
vllm_num_engines                     generators.num
vllm.num_engines                     generators.num
vllm_tensor_parallel_size            generators.tensor_parallel_size
vllm.tensor_parallel_size            generators.tensor_parallel_size
vllm_gpu_memory_utilization          rollout.engine_args              {gpu_memory_utilization: 0.9}
vllm.gpu_memory_utilization          rollout.engine_args              {gpu_memory_utilization: 0.9}
enforce_eager                        rollout.engine_args              {enforce_eager: true}
vllm.enforce_eager                   rollout.engine_args              {enforce_eager: true}
zero_stage                           policy.zero_stage                the critic has its own
ds.zero_stage                        policy.zero_stage                the critic has its own
bf16                                 model.dtype                      bfloat16
ds.param_dtype                       model.dtype                      bfloat16, float16
load_in_4bit                         model.quantization               nf4
lora_rank                            lora.r
ds.lora.rank                         lora.r
lora_alpha                           lora.alpha
ds.lora.alpha                        lora.alpha
target_modules                       lora.target_modules
ds.lora.target_modules               lora.target_modules
train.seed                           run.seed
save_path                            run.dir
ckpt_path                            run.dir
ckpt.output_dir                      run.dir
ckpt.path                            run.dir
save_steps                           ppo.save_every                   iterations
ckpt.save_steps                      ppo.save_every                   iterations
eval_steps                           ppo.eval_every                   iterations
max_ckpt_num                         ppo.keep_checkpoints
ckpt.max_num                         ppo.keep_checkpoints
load_checkpoint                      run.resume                       auto: the same command goes on
ckpt.load_enable                     run.resume                       auto: the same command goes on
use_wandb                            trackers.wandb                   its key: wandb login, or WANDB_API_KEY
wandb_project                        trackers.wandb.project
wandb_org                            trackers.wandb.entity
wandb_group                          trackers.wandb.group
wandb_run_name                       run.name
use_tensorboard                      trackers.tensorboard
colocate_all_models                  placement.gpus                   a part: roles share GPUs
vllm_enable_sleep                    placement.turns                  generators and learners
deepspeed_enable_sleep               placement.turns                  generators and learners
colocate_critic_reward               placement.share                  [[critic, reward]], each with placement.ROLE.gpus below 1
colocate_actor_ref                   reference.kind                   policy_base: one copy serves both
remote_rm_url                        rewards                          {type: remote, url: ...}; a Python file: {type: function, signature: openrlhf}
reward.remote_url                    rewards                          {type: remote, url: ...}; a Python file: {type: function, signature: openrlhf}
label_key                            data.prompts.columns             {label: their column}
data.label_key                       data.prompts.columns             {label: their column}
prompt_split                         data.prompts.split
data.prompt_split                    data.prompts.split
prompt_data_probs                    data.prompts.weight
data.prompt_probs                    data.prompts.weight
apply_chat_template                  template.kind                    chat
data.apply_chat_template             template.kind                    chat
gradient_checkpointing               policy.gradient_checkpointing    the critic has its own
actor.gradient_checkpointing_enable  policy.gradient_checkpointing
reward_clip_range                    rewards                          clip of each source
reward.clip_range                    rewards                          clip of each source
normalize_reward                     rewards                          scale: running, of each source
reward.normalize_enable              rewards                          scale: running, of each source
ds.load_in_4bit                      model.quantization               nf4
lora_dropout                         lora.dropout                     off in PPO
ds.lora.dropout                      lora.dropout                     off in PPO
ds.attn_implementation               model.attn_implementation
eval.dataset                         data.eval
eval.steps                           ppo.eval_every                   iterations
actor.max_norm                       ppo.max_grad_norm
critic.max_norm                      ppo.max_grad_norm
actor.adam.eps                       ppo.adam_epsilon
rollout.max_tokens_per_gpu           ppo.max_tokens_per_micro_batch
logger.wandb.key                     trackers.wandb                   its key: wandb login, or WANDB_API_KEY
logger.wandb.project                 trackers.wandb.project
logger.wandb.org                     trackers.wandb.entity
logger.wandb.group                   trackers.wandb.group
logger.wandb.run_name                run.name
logger.tensorboard_dir               trackers.tensorboard
algo.kl.estimator                    ppo.kl_estimator
use_kl_loss                          ppo.kl_in                        loss
algo.kl.use_loss                     ppo.kl_in                        loss
eps_clip_low_high                    ppo.clip_range_high              the lower end: ppo.clip_range
actor.eps_clip_low_high              ppo.clip_range_high              the lower end: ppo.clip_range
actor.dual_clip                      ppo.dual_clip
entropy_loss_coef                    ppo.entropy_coef
actor.entropy_coef                   ppo.entropy_coef
enable_vllm_is_correction            ppo.importance_cap               theirs also has a lower bound
algo.advantage.is_correction_enable  ppo.importance_cap               theirs also has a lower bound
"""  # noqa: E501

VERL = """
actor_rollout_ref.model.path                           model.path                       with sft in run.stages; a finished one: sft.path
actor_rollout_ref.model.trust_remote_code              model.trust_remote_code
actor_rollout_ref.model.lora_rank                      lora.r
actor_rollout_ref.model.lora_alpha                     lora.alpha
actor_rollout_ref.model.target_modules                 lora.target_modules
actor_rollout_ref.actor.optim.lr                       ppo.learning_rate
actor_rollout_ref.actor.ppo_mini_batch_size            ppo.mini_batch_size              theirs counts prompts, ours rollouts
actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu   ppo.max_tokens_per_micro_batch   ours counts tokens
actor_rollout_ref.actor.ppo_max_token_len_per_gpu      ppo.max_tokens_per_micro_batch
actor_rollout_ref.actor.ppo_epochs                     ppo.epochs
actor_rollout_ref.actor.clip_ratio                     ppo.clip_range
actor_rollout_ref.actor.grad_clip                      ppo.max_grad_norm
actor_rollout_ref.hybrid_engine                        placement.turns                  generators and learners are processes of their own
actor_rollout_ref.rollout.name                         rollout.engine
actor_rollout_ref.rollout.n                            ppo.samples_per_prompt
actor_rollout_ref.rollout.temperature                  rollout.temperature
actor_rollout_ref.rollout.top_k                        rollout.top_k                    -1 there is 0 here
actor_rollout_ref.rollout.top_p                        rollout.top_p
actor_rollout_ref.rollout.ignore_eos                   rollout.ignore_eos
actor_rollout_ref.rollout.dtype                        rollout.dtype
actor_rollout_ref.rollout.prompt_length                rollout.max_prompt_tokens
actor_rollout_ref.rollout.response_length              rollout.max_tokens
actor_rollout_ref.rollout.tensor_model_parallel_size   generators.tensor_parallel_size
actor_rollout_ref.rollout.gpu_memory_utilization       rollout.engine_args              {gpu_memory_utilization: 0.9}
actor_rollout_ref.rollout.enforce_eager                rollout.engine_args              {enforce_eager: true}
critic.model.path                                      critic.path
critic.model.lora_rank                                 critic.lora.r
critic.optim.lr                                        critic.learning_rate
critic.cliprange_value                                 ppo.value_clip_range
reward_model.model.path                                reward.path
data.train_files                                       data.prompts                     {path: FILE, format: verl}
data.val_files                                         data.eval                        {path: FILE, format: verl}
data.prompt_key                                        data.prompts.columns             {prompt: their column}
data.max_prompt_length                                 rollout.max_prompt_tokens
data.max_response_length                               rollout.max_tokens
data.train_batch_size                                  ppo.batch_size                   theirs counts prompts, ours rollouts
data.truncation                                        data.overlong
data.filter_overlong_prompts                           data.overlong                    drop
algorithm.adv_estimator                                ppo.advantage
algorithm.gamma                                        ppo.gamma
algorithm.lam                                          ppo.gae_lambda
algorithm.kl_ctrl.type                                 ppo.kl_target                    null: a fixed coefficient
algorithm.kl_ctrl.kl_coef                              ppo.kl_coef
algorithm.kl_ctrl.horizon                              ppo.kl_horizon
algorithm.kl_ctrl.target_kl                            ppo.kl_target                    ours in nats a response
trainer.project_name                                   trackers.wandb.project
trainer.experiment_name                                run.name
trainer.logger                                         trackers                         a section for each tracker
trainer.default_local_dir                              run.dir
trainer.save_freq                                      ppo.save_every
trainer.test_freq                                      ppo.eval_every
trainer.resume_mode                                    run.resume
trainer.total_training_steps                           ppo.iterations
trainer.total_epochs                                   ppo.iterations                   theirs are passes over the prompts
trainer.n_gpus_per_node                                policy.num_ranks                 every role has processes of its own
trainer.nnodes                                         policy.num_ranks                 every role has processes of its own
actor_rollout_ref.model.enable_gradient_checkpointing  policy.gradient_checkpointing
critic.model.enable_gradient_checkpointing             critic.gradient_checkpointing
custom_reward_function.path                            rewards                          {type: function, function: FILE:NAME, signature: verl}
custom_reward_function.name                            rewards                          {type: function, function: FILE:NAME, signature: verl}
data.apply_chat_template_kwargs                        template.kwargs
algorithm.use_kl_in_reward                             ppo.kl_in  reward, the default
actor_rollout_ref.actor.clip_ratio_low                 ppo.clip_range
actor_rollout_ref.actor.clip_ratio_high                ppo.clip_range_high
actor_rollout_ref.actor.clip_ratio_c                   ppo.dual_clip
actor_rollout_ref.actor.entropy_coeff                  ppo.entropy_coef
actor_rollout_ref.actor.use_kl_loss                    ppo.kl_in                        loss
actor_rollout_ref.actor.kl_loss_coef                   ppo.kl_coef                      with kl_in: loss
actor_rollout_ref.actor.kl_loss_type                   ppo.kl_estimator                 low_var_kl: k3
algorithm.kl_penalty                                   ppo.kl_estimator                 kl: k1, mse: k2, low_var_kl: k3
"""  # noqa: E501
