"""Who gets which picture, and what happens when workers die: over workers that are threads of this process.

`test_ray.py` has the same with processes.
"""

import errno
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image
from plain_upscaler import Bicubic

from tudsr_core.batch import Output, Work, open_manifest, plan_jobs, run_on_workers
from tudsr_core.batch import workers as inside
from tudsr_core.batch.dispatch import Crew
from tudsr_core.batch.workers import AT_ONCE, WorkerDied, Workplace
from tudsr_core.cli.batches import Voice
from tudsr_core.methods import Target


class ThreadWorker:
    """The inside of a worker in threads; `before` is called with the name of every picture it computes."""

    def __init__(self, before=lambda name: None, settings=None):
        self.place, self.pool = Workplace(), ThreadPoolExecutor(AT_ONCE)
        self.before, self.settings, self.orders = before, settings or {"scale": 2}, []
        self.asked, self.most = [], 0

    def make(self):
        def upscaler_for(job):
            return Bicubic(lambda number: self.before(job.source.stem))

        return Work(upscaler_for, Target(scale=2), Output()), lambda: self.settings

    def start(self):
        return self.pool.submit(self.place.start, self.make)

    def upscale(self, order):
        self.orders.append(order.job.source.stem)
        self.asked.append(self.pool.submit(self.place.upscale, order))
        self.most = max(self.most, sum(not answer.done() for answer in self.asked))
        return self.asked[-1]

    def stop(self):
        self.pool.shutdown(cancel_futures=True)


@pytest.fixture
def folder(tmp_path):
    """Nine pictures, of which 0 is the smallest, and one that is none."""
    (tmp_path / "in").mkdir()
    for shade in range(9):
        Image.new("RGB", (4 + shade, 4), (shade, 0, 0)).save(tmp_path / "in" / f"{shade}.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"nothing")
    (tmp_path / "out").mkdir()
    return tmp_path


def run(folder, team, voice=Voice, hire=None, ship=False):
    jobs, said = plan_jobs([folder / "in"], folder / "out"), team[0].start().result()
    crew = Crew(hire or (lambda: team[0]), {worker: worker.start() for worker in team}, said, ship)
    try:
        with open_manifest(folder / "out", said.settings) as manifest:
            return run_on_workers(jobs, crew, voice(len(jobs)), manifest)
    finally:
        for worker in crew.starting:
            worker.stop()


@pytest.mark.parametrize("ship", [False, True])
def test_the_dearest_are_given_out_first_and_none_waits_behind_three(folder, ship):
    team = ThreadWorker(), ThreadWorker()
    summary = run(folder, team, ship=ship)
    assert summary.done == {"written": 9} and [job.source.name for job in summary.failed] == ["bad.png"]
    assert "8" in [worker.orders[0] for worker in team if worker.orders]
    for worker in team:
        assert worker.orders == sorted(worker.orders, key=lambda name: -1 if name == "bad" else int(name), reverse=True)
        assert worker.most <= AT_ONCE
    assert [Image.open(folder / "out" / f"{n}.png").getpixel((0, 0))[0] for n in range(9)] == list(range(9))
    assert not list((folder / "out").glob(".*"))


def test_errors_name_the_pictures_of_the_run_also_when_files_were_sent(folder, capfd):
    run(folder, [ThreadWorker()], ship=True)
    assert f"error: {folder / 'in' / 'bad.png'}: this is not a picture" in capfd.readouterr().err


def dying_of(name, times):
    left = [times]

    def before(picture):
        if picture == name and left[0]:
            left[0] -= 1
            raise WorkerDied("killed")

    return before


@pytest.mark.parametrize(("times", "failed"), [(2, ["bad"]), (3, ["bad", "4"])])
def test_a_picture_is_tried_on_three_workers_and_then_given_up(folder, times, failed, caplog):
    before, hired = dying_of("4", times), []

    def hire():
        hired.append(ThreadWorker(before))
        return hired[-1]

    summary = run(folder, [ThreadWorker(before), ThreadWorker(before)], hire=hire)
    assert summary.done == {"written": 10 - len(failed)}
    assert sorted(job.source.stem for job in summary.failed) == sorted(failed)
    assert len(hired) == times and caplog.text.count("another takes its place") == times
    if times == 3:
        assert "4.png: 3 workers died computing it (killed)" in (folder / "out" / "tudsr-run.jsonl").read_text("utf-8")


def test_a_run_without_workers_ends_with_what_is_left(folder):
    def hire():
        nobody = ThreadWorker()
        nobody.start = lambda: nobody.pool.submit(lambda: (_ for _ in ()).throw(WorkerDied("no memory")))
        return nobody

    summary = run(folder, [ThreadWorker(dying_of("8", 1))], hire=hire)
    assert str(summary.stopped) == "no worker is left; look at the cluster" and summary.left > 0


def test_a_worker_with_other_files_is_left_out(folder, caplog):
    other = ThreadWorker(settings={"scale": 2, "model": "sha256:0"})
    assert run(folder, [ThreadWorker(), other]).done == {"written": 9}
    assert other.orders == [] and "would make other pictures: model not set, now sha256:0" in caplog.text


def test_a_full_disk_of_a_worker_stops_the_run(folder, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(inside, "complete_or_absent", full)
        summary = run(folder, [ThreadWorker()])
    assert "no room left on the disk" in str(summary.stopped) and summary.left >= 9 - AT_ONCE
    assert run(folder, [ThreadWorker()]).done == {"written": 9}


def test_an_interrupt_lets_pictures_in_flight_finish(folder, caplog):
    class Impatient(Voice):
        def wrote(self, number, outcome):
            if not caplog.text:
                signal.raise_signal(signal.SIGINT)

    worker = ThreadWorker()
    with pytest.raises(KeyboardInterrupt):
        run(folder, [worker], voice=Impatient)
    assert "in flight are finished first; Ctrl-C again ends at once" in caplog.text
    done = len(list((folder / "out").glob("*.png")))
    assert done == len(worker.orders) < 9, "what was given out, and nothing else"
    assert run(folder, [ThreadWorker()]).done == {"done before": done, "written": 9 - done}


def test_a_second_interrupt_ends_at_once(folder):
    class Impatient(Voice):
        def wrote(self, number, outcome):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(folder, [ThreadWorker()], voice=Impatient)
    before = signal.getsignal(signal.SIGINT)
    assert before is signal.default_int_handler and not list((folder / "out").glob(".*"))
    again = run(folder, [ThreadWorker()])
    assert again.done["written"] + again.done["done before"] == 9 and again.done["written"] >= 6
