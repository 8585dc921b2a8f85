"""Low-rank training under trainers of others, one module for each: import the one that is wanted.

from hpclr.integrations.hugging_face import HuggingFaceCallback
from hpclr.integrations.lightning import LightningCallback
"""
