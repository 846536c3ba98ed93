"""The whole configuration: one section per stage."""

from typing import Self

from pydantic import model_validator

from k2.config.base import Section, setting
from k2.config.corpus import CorpusConfig
from k2.config.evaluate import EvaluateConfig
from k2.config.export import ExportConfig
from k2.config.gate import GateConfig
from k2.config.ingest import IngestConfig
from k2.config.pretrain import PretrainConfig
from k2.config.promote import PromoteConfig
from k2.config.quantize import QuantizeConfig, group_problem
from k2.config.rephrase import RephraseConfig
from k2.config.report import ReportConfig
from k2.config.rl import RlConfig
from k2.config.sft import SftConfig
from k2.config.synthesize import SynthesizeConfig
from k2.config.tokenize import TokenizeConfig


class K2Config(Section):
    """Everything a run of the pipeline is decided by."""

    preset: str = setting("tiny", "the preset this configuration started from", semantic=False)
    run: str = setting("", "name of the run; names its record and report", semantic=False)
    corpus: CorpusConfig = CorpusConfig()
    ingest: IngestConfig = IngestConfig()
    rephrase: RephraseConfig = RephraseConfig()
    tokenize: TokenizeConfig = TokenizeConfig()
    pretrain: PretrainConfig = PretrainConfig()
    synthesize: SynthesizeConfig = SynthesizeConfig()
    sft: SftConfig = SftConfig()
    rl: RlConfig = RlConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    export: ExportConfig = ExportConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()
    promote: PromoteConfig = PromoteConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.pretrain.model.vocab_size != self.tokenize.vocab_size:
            raise ValueError(
                f"pretrain.model.vocab_size ({self.pretrain.model.vocab_size}) must equal"
                f" tokenize.vocab_size ({self.tokenize.vocab_size})"
            )
        problem = group_problem(self.pretrain.model, self.quantize.group_size)
        if problem:
            raise ValueError(problem)
        return self
