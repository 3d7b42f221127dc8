"""The toy: data sets, metrics and classifier, sampling with any method, pictures.

    from toy import data, drawing, metrics, sampling

Scripts, experiments and notebooks import it. It imports erg.py and tiny_dit.py alone.
"""
