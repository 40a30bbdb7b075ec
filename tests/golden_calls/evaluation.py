"The zoo's pair of mean and results, as the cases hold it."
from detlearn.evaluation.voc_map import eval_map as ours


def eval_map(**args):
    mean, results = ours(**args)
    return dict(mean_ap=mean, **{k: [r[k] for r in results] for k in ('ap', 'recall', 'precision', 'num_gts', 'num_dets')})


FUNCTIONS = dict(eval_map=eval_map)
