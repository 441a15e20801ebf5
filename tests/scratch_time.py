import time

import test_run_state as t


def go(d, turn):
    import cProfile
    import io
    import pstats

    pr = cProfile.Profile()
    c0 = time.process_time()
    w0 = time.time()
    pr.enable()
    r = t.read_some(d, turn)
    pr.disable()
    s = io.StringIO()
    pstats.Stats(pr, stream=s).sort_stats("tottime").print_stats(14)
    return r, time.process_time() - c0, time.time() - w0, s.getvalue()
