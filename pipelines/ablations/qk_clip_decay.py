"""Does clipping stop by itself once the learning rate decays, as it did in Kimi K2's training (report, section 2.1)?

`k2 run --pipeline ablations/qk_clip_decay` runs it on this machine: the arms of `qk_clip` in its setting, but the
second half of the training decays the learning rate to a tenth, Kimi K2's share (report, section 2.5).
"""

from k2.config.ablations import StudyConfig
from k2.config.load import merge
from pipelines.ablations import qk_clip
from pipelines.ablations.study import study_pipeline

STUDY = StudyConfig(
    name="qk_clip_decay",
    title="QK-Clip under a decaying learning rate",
    question="Does clipping stop by itself when the learning rate decays, and do logits keep growing without it?",
    settings={
        "tiny": merge(qk_clip.TINY, {"pretrain": {"stable_tokens": 286720, "decay_tokens": 307200}}),
        "nano": qk_clip.NANO,
    },
    arms=qk_clip.STUDY.arms,
    reference="muon",
    seeds=(1, 2, 3),
    columns=(*qk_clip.STUDY.columns, "clipping_end", "last_clip"),
    curves=("max_logit", "clipping", "difference"),
)

qk_clip_decay = study_pipeline(STUDY)
