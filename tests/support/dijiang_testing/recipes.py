"""Small recipes as YAML, to be added to."""

HEAD = "source: a/model\noutput: out\n"
DATA = "data: {train: [a.txt]}\n"
ALIGN = "align: {tokens: 4096}\n"
DISTILL = "distill: {tokens: 4096}\n"
SMALL = HEAD + DATA + ALIGN
BOTH = SMALL + DISTILL
# stages all of whose keys have an effect
USED = [
    "align: {trains: attention, attention_learning_rate: 1e-3, calibrate_blocks: 1, branch_scale_offset: 1, final_share: 0.1}",
    "align: {linear_weight: 0.5, window_dropout: 0.5}",
    "convert: {preset: paper, settings: {attention_window: 3, normalize: true}}\nalign: {linear_weight: 0.5}",
    "distill: {lora_rank: 4, lora_alpha: 8, learning_rate: 1e-4, attention_learning_rate: 1e-4}",
    "distill: {trains: attention, lora_rank: 4, attention_learning_rate: 1e-4, temperature: 2, teacher_top_k: 9}",
    "distill: {train_embeddings: true, schedule: flat}",
    "distill: {trains: attention, learning_rate: null}",
]
