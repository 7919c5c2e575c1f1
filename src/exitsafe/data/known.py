"""The suites that exitsafe knows by name, one short entry each. No sample is included.

Ids, columns and licences are those on the sets' cards; a revision is a commit of the set on the Hub that public
projects pin too. If none is pinned, the newest is used and the run records its commit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from exitsafe.records import Kind


@dataclass(frozen=True, kw_only=True)
class KnownSuite:
    """A data set on the Hub and how its rows become samples.

    Args:
        name: Name on the command line; also the prefix of the samples' ids.
        title, size, licence, is_gated, citation: From the set's card and paper.
        hub_id, configs, split: Where to find it; several configurations are read one after the other.
        revision: A full commit, or None for the newest.
        prompt: The column of the prompt.
        kind: The kind of every sample, or the kinds by value of `kind_column`.
        id: The column of an id that is unique within a configuration; without one, the row's number from 0, which is
            fixed by the commit as well.
        category: The column of the category; without one, the configuration if there are several.
        context: A column to put before the prompt, where it exists.
        instruction: Text appended to every prompt.
        image, video, audio: The column of a picture, a video or an audio clip.
        is_by_path: Whether these columns hold paths, relative to `folder` in the set, instead of the files themselves.
        answers: The column of the reference answers, a list of texts or of records with `answer`.
        needs_images: Whether the suite needs the user's own pictures.
        is_large: Whether it is read row by row from the Hub, and only with a limit.
        note: One more sentence for users.
    """

    name: str
    title: str
    size: int
    licence: str
    is_gated: bool = False
    citation: str
    hub_id: str
    configs: tuple[str, ...] = ()
    split: str
    revision: str | None
    prompt: str
    kind: Kind | Mapping[str, Kind]
    kind_column: str = ""
    id: str = ""
    category: str = ""
    context: str = ""
    instruction: str = ""
    image: str = ""
    video: str = ""
    audio: str = ""
    is_by_path: bool = False
    folder: str = ""
    answers: str = ""
    needs_images: bool = False
    is_large: bool = False
    note: str = ""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of its samples."""
        return (self.kind,) if isinstance(self.kind, str) else tuple(dict.fromkeys(self.kind.values()))

    @property
    def media(self) -> dict[str, str]:
        """The columns of pictures, videos and audio, by field of a sample: `image`, `video`, `audio`."""
        columns = {"image": self.image, "video": self.video, "audio": self.audio}
        return {field: column for field, column in columns.items() if column}

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        named = (self.id, self.prompt, self.category, self.kind_column, *self.media.values(), self.answers)
        return tuple(dict.fromkeys(filter(None, named)))

    @property
    def pictures(self) -> str:
        """Where its samples' pictures, videos or audio come from."""
        others = "".join(f"{field}s " for field in self.media if field != "image")
        if self.media:
            return others + ("by path" if self.is_by_path else "in the set")
        return "yours" if self.needs_images else "none, or yours"

    @property
    def page(self) -> str:
        """The set's page on the Hub."""
        return f"https://huggingface.co/datasets/{self.hub_id}"


_JAILBREAKV = (
    "Luo, Ma, Liu, Guo, Xiao: JailBreakV: A Benchmark for Assessing the Robustness of MultiModal Large Language "
    "Models against Jailbreak Attacks. COLM 2024, arXiv:2404.03027"
)
_ADVBENCH = (
    "Zou, Wang, Carlini, Nasr, Kolter, Fredrikson: Universal and Transferable Adversarial Attacks on Aligned "
    "Language Models. 2023, arXiv:2307.15043"
)
_JBB = (
    "Chao et al.: JailbreakBench: An Open Robustness Benchmark for Jailbreaking Large Language Models. NeurIPS 2024 "
    "Datasets and Benchmarks, arXiv:2404.01318"
)

_VIDEO_SAFETYBENCH = (
    "Liu, Li, He, Li, Xia, Cui, Huang, Yang, He: Video-SafetyBench: A Benchmark for Safety Evaluation of Video LVLMs. "
    "NeurIPS 2025 Datasets and Benchmarks, arXiv:2505.11842"
)
_VIDEOS = (
    "The Hub has the videos as video.tar.gz: unpack it in your copy, or anywhere and give that folder as --images."
)

# columns as its authors' FlagEvalMM reads them, November 2026
_VIDEO_SUITE = KnownSuite(
    name="video-safetybench",
    title="Video-SafetyBench, harmful queries",
    size=1132,
    licence="CC-BY-NC-SA-4.0",
    is_gated=True,
    citation=_VIDEO_SAFETYBENCH,
    hub_id="BAAI/Video-SafetyBench",
    split="harmful",
    revision="b04daeb5f6c185df47e2aacb4d30b87912c51114",
    id="question_id",
    prompt="question",
    category="category",
    kind="harmful",
    video="video_path",
    is_by_path=True,
    note=_VIDEOS,
)
_ENTRIES = (
    KnownSuite(
        name="redteam2k",
        title="RedTeam-2K",
        size=2000,
        licence="MIT",
        citation=_JAILBREAKV,
        hub_id="JailbreakV-28K/JailBreakV-28k",
        configs=("RedTeam_2K",),
        split="RedTeam_2K",
        revision="f949ca582fff13d396ac8fce59596afafb2b78d3",
        prompt="question",
        category="policy",
        kind="harmful",
    ),
    KnownSuite(
        name="minijailbreakv",
        title="miniJailBreakV-28K",
        size=280,
        licence="MIT",
        citation=_JAILBREAKV,
        hub_id="JailbreakV-28K/JailBreakV-28k",
        configs=("JailBreakV_28K",),
        split="mini_JailBreakV_28K",
        revision="f949ca582fff13d396ac8fce59596afafb2b78d3",
        prompt="jailbreak_query",
        category="policy",
        kind="harmful",
        image="image_path",
        is_by_path=True,
        folder="JailBreakV_28K",
        note="The Hub has only some of the pictures; its page says how to request all of them from the authors.",
    ),
    KnownSuite(
        name="advbench-coco",
        title="AdvBench with COCO pictures",
        size=520,
        licence="MIT",
        is_gated=True,
        citation=_ADVBENCH,
        hub_id="walledai/AdvBench",
        split="train",
        revision="9d4730540082fa4017450b65ca1c0e1d8d30446e",
        prompt="prompt",
        kind="harmful",
        needs_images=True,
        note="Give your copy of COCO val2017 (https://cocodataset.org) as --images.",
    ),
    KnownSuite(
        name="harmbench",
        title="HarmBench, standard and contextual behaviours",
        size=300,
        licence="MIT",
        is_gated=True,
        citation="Mazeika et al.: HarmBench: A Standardized Evaluation Framework for Automated Red Teaming and Robust "
        "Refusal. ICML 2024, arXiv:2402.04249",
        hub_id="walledai/HarmBench",
        configs=("standard", "contextual"),
        split="train",
        revision="fb6c2afd5a2a943d701d6db3efab87d077e81be5",
        prompt="prompt",
        context="context",
        category="category",
        kind="harmful",
        note="The 100 copyright behaviours are left out: they are judged by hashes of the works, not by a classifier.",
    ),
    KnownSuite(
        name="jbb-behaviors",
        title="JBB-Behaviors, harmful",
        size=100,
        licence="MIT",
        citation=_JBB,
        hub_id="JailbreakBench/JBB-Behaviors",
        configs=("behaviors",),
        split="harmful",
        revision="886acc352a31533ffbcf4ef22c744658688086fc",
        id="Index",
        prompt="Goal",
        category="Category",
        kind="harmful",
    ),
    KnownSuite(
        name="jbb-benign",
        title="JBB-Behaviors, benign",
        size=100,
        licence="MIT",
        citation=_JBB,
        hub_id="JailbreakBench/JBB-Behaviors",
        configs=("behaviors",),
        split="benign",
        revision="886acc352a31533ffbcf4ef22c744658688086fc",
        id="Index",
        prompt="Goal",
        category="Category",
        kind="borderline",
        note="On the same topics as the harmful ones, to measure over-refusal.",
    ),
    KnownSuite(
        name="strongreject",
        title="StrongREJECT",
        size=313,
        licence="MIT",
        is_gated=True,
        citation="Souly et al.: A StrongREJECT for Empty Jailbreaks. NeurIPS 2024 Datasets and Benchmarks, "
        "arXiv:2402.10260",
        hub_id="walledai/StrongREJECT",
        split="train",
        revision="df54272b395ce9e584d2f8140519935425d8549f",
        prompt="prompt",
        category="category",
        kind="harmful",
    ),
    KnownSuite(
        name="mm-safetybench",
        title="MM-SafetyBench, pictures with typography",
        size=1680,
        licence="CC-BY-NC-4.0",
        citation="Liu, Zhu, Gu, Lan, Yang, Qiao: MM-SafetyBench: A Benchmark for Safety Evaluation of Multimodal Large "
        "Language Models. ECCV 2024, arXiv:2311.17600",
        hub_id="PKU-Alignment/MM-SafetyBench",
        configs=(
            "EconomicHarm",
            "Financial_Advice",
            "Fraud",
            "Gov_Decision",
            "HateSpeech",
            "Health_Consultation",
            "Illegal_Activitiy",  # spelt like this in the set
            "Legal_Opinion",
            "Malware_Generation",
            "Physical_Harm",
            "Political_Lobbying",
            "Privacy_Violence",
            "Sex",
        ),
        split="SD_TYPO",
        revision=None,
        id="id",
        prompt="question",
        kind="harmful",
        image="image",
        note="The scenarios are its categories; --limit keeps the first of the first scenario.",
    ),
    KnownSuite(
        name="xstest",
        title="XSTest",
        size=450,
        licence="CC-BY-4.0",
        is_gated=True,
        citation="Röttger, Kirk, Vidgen, Attanasio, Bianchi, Hovy: XSTest: A Test Suite for Identifying Exaggerated "
        "Safety Behaviours in Large Language Models. NAACL 2024, arXiv:2308.01263",
        hub_id="walledai/XSTest",
        split="test",
        revision="f1d713187c61b6ae64e602d74f0b3d812cc2e8e8",
        prompt="prompt",
        category="type",
        kind_column="label",
        kind={"safe": "borderline", "unsafe": "harmful"},
    ),
    KnownSuite(
        name="or-bench-hard",
        title="OR-Bench-Hard-1K",
        size=1319,
        licence="CC-BY-4.0",
        citation="Cui, Chiang, Stoica, Hsieh: OR-Bench: An Over-Refusal Benchmark for Large Language Models. ICML "
        "2025, arXiv:2405.20947",
        hub_id="bench-llm/or-bench",
        configs=("or-bench-hard-1k",),
        split="train",
        revision="e36d8b80e81837c8a8f264bbb2a49f1b32c7e272",
        prompt="prompt",
        category="category",
        kind="borderline",
    ),
    KnownSuite(
        name="mossbench",
        title="MOSSBench",
        size=300,
        licence="CC-BY-SA-4.0",
        citation="Li, Zhou, Wang, Zhou, Cheng, Hsieh: MOSSBench: Is Your Multimodal Language Model Oversensitive to "
        "Safe Queries? 2024, arXiv:2406.17806",
        hub_id="AIcell/MOSSBench",
        configs=("oversensitivity",),
        split="train",
        revision=None,
        id="pid",
        prompt="question",
        category="metadata_over",
        kind="borderline",
        image="image",
        note="The licence is that of its GitHub repository; its card on the Hub only says cc.",
    ),
    # columns as lmms-eval reads them, November 2026
    KnownSuite(
        name="holisafe",
        title="HoliSafe-Bench",
        size=4031,
        licence="CC-BY-NC-4.0",
        is_gated=True,
        citation="Lee, Kim, Park, Jung, Jang, Lee, Lee, Hwang: HoliSafe: Holistic Safety Benchmarking and Modeling for "
        "Vision-Language Model. 2025, arXiv:2506.04704",
        hub_id="etri-vilab/holisafe-bench",
        split="test",
        revision=None,
        id="id",
        prompt="query",
        # picture, text and both together: safe (S) or unsafe (U)
        category="type",
        kind_column="type",
        kind={"SSS": "borderline", "SSU": "harmful", "SUU": "harmful", "USU": "harmful", "UUU": "harmful"},
        image="image",
        note="The categories are its combinations: picture, text and both together, each safe (S) or unsafe (U). "
        "Pictures from other sets keep their own licences.",
    ),
    _VIDEO_SUITE,
    replace(
        _VIDEO_SUITE,  # of kind harmful too: the paper counts an answer to these as a successful attack
        name="video-safetybench-benign",
        title="Video-SafetyBench, benign queries",
        split="benign",
        note="The queries are harmless by themselves, and harmful together with the videos. " + _VIDEOS,
    ),
    KnownSuite(
        name="vqav2",
        title="VQAv2, validation",
        size=214354,
        licence="CC-BY-4.0",
        citation="Goyal, Khot, Summers-Stay, Batra, Parikh: Making the V in VQA Matter: Elevating the Role of Image "
        "Understanding in Visual Question Answering. CVPR 2017, arXiv:1612.00837",
        hub_id="lmms-lab-encoder/VQAv2",
        split="validation",
        revision="32665d35052eb4a6d4414851c3c829a72754915a",
        id="question_id",
        prompt="question",
        # the evaluation prompt of LLaVA-1.5 and lmms-eval: the references are of one or two words
        instruction="\nAnswer the question using a single word or phrase.",
        category="answer_type",
        kind="vqa",
        image="image",
        answers="answers",
        is_large=True,
    ),
)

KNOWN_SUITES: dict[str, KnownSuite] = {entry.name: entry for entry in _ENTRIES}
