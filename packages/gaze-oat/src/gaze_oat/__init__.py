"""Where people look: object-level scanpath prediction, and every established scanpath metric."""

from gaze_oat.baselines import (
    CentreBiasKernel,
    LengthMatched,
    MarkovKernel,
    NearestUnvisitedKernel,
    PositionPriorKernel,
    RandomKernel,
    TransitionKernel,
    fit_baselines,
)
from gaze_oat.behaviour import (
    BEHAVIOURS,
    StepStatistics,
    behaviour,
    behaviour_delta,
    behaviour_means,
    step_statistics,
)
from gaze_oat.drawing import draw_scanpath, plot_paths, save_gif, save_png
from gaze_oat.errors import ScanpathProblem
from gaze_oat.evaluation import EvaluationConfig, between_observers, evaluate
from gaze_oat.fixation_maps import fixation_map, nss
from gaze_oat.generation import GeneratedPaths
from gaze_oat.layouts import Layout, to_cells
from gaze_oat.likelihood import done_probabilities, negative_log_likelihood, sim
from gaze_oat.multimatch import multimatch
from gaze_oat.oat import OATConfig, OATModel, SceneBatch
from gaze_oat.object_encoder import crop_objects, position_features
from gaze_oat.pairing import all_pairs, between_pairs, elementwise, matching_pairs
from gaze_oat.pointer import PointerHead
from gaze_oat.position_code import closed_code, position_table, solved_code
from gaze_oat.readers import read_amazon_covers, read_coco_search18, write_amazon_covers_like
from gaze_oat.scanpaths import (
    Scanpath,
    ScanpathData,
    Scene,
    path_of_objects,
    read_csv,
    read_json,
    write_csv,
    write_json,
)
from gaze_oat.sequence_alignment import edit_distance, scanmatch, sequence_score
from gaze_oat.splits import leave_one_group_out, scene_folds, split_scenes
from gaze_oat.training import EpochReport, OATTrainer, TrainingConfig, Trial

__all__ = [
    "BEHAVIOURS",
    "CentreBiasKernel",
    "EpochReport",
    "EvaluationConfig",
    "GeneratedPaths",
    "Layout",
    "LengthMatched",
    "MarkovKernel",
    "NearestUnvisitedKernel",
    "OATConfig",
    "OATModel",
    "OATTrainer",
    "PointerHead",
    "PositionPriorKernel",
    "RandomKernel",
    "Scanpath",
    "ScanpathData",
    "ScanpathProblem",
    "Scene",
    "SceneBatch",
    "StepStatistics",
    "TrainingConfig",
    "TransitionKernel",
    "Trial",
    "all_pairs",
    "behaviour",
    "behaviour_delta",
    "behaviour_means",
    "between_observers",
    "between_pairs",
    "closed_code",
    "crop_objects",
    "done_probabilities",
    "draw_scanpath",
    "edit_distance",
    "elementwise",
    "evaluate",
    "fit_baselines",
    "fixation_map",
    "leave_one_group_out",
    "matching_pairs",
    "multimatch",
    "negative_log_likelihood",
    "nss",
    "path_of_objects",
    "plot_paths",
    "position_features",
    "position_table",
    "read_amazon_covers",
    "read_coco_search18",
    "read_csv",
    "read_json",
    "save_gif",
    "save_png",
    "scanmatch",
    "scene_folds",
    "sequence_score",
    "sim",
    "solved_code",
    "split_scenes",
    "step_statistics",
    "to_cells",
    "write_amazon_covers_like",
    "write_csv",
    "write_json",
]
