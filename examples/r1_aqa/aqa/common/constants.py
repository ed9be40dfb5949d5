"""Numbers and texts of Qwen2-Audio that several rooms need. Imports nothing, so that light commands can read it."""

SAMPLING_RATE = 16_000  # Hz
HOP_LENGTH = 160  # samples a mel frame
MAX_FRAMES = 3_000  # mel frames that the audio tower takes: 30 s
MIN_FRAMES = 3  # the tower's two poolings leave no audio token of fewer
MAX_AUDIO_TOKENS = 750  # of a clip: each of the tower's two poolings halves the frames

# The chat template ends a prompt with this, and the response begins behind it.
ASSISTANT_HEADER = "<|im_start|>assistant\n"
AUDIO_TOKEN = "<|AUDIO|>"  # stands for a clip in a rendered prompt; the same in Qwen2.5-Omni

# Values of the column that names the reward rule of a row.
PLAIN_LABEL = "avqa_rule"
THINK_LABEL = "avqa_think_rule"
