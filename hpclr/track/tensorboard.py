"""TensorBoard's event files, made anew from all records by each attempt."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter

from hpclr.track.heatmap import HeatMap
from hpclr.track.records import Record
from hpclr.track.scalars import scalars, time_of

# What of layers a check's record has → the name of its picture
_TAGS = {"ranks": "layers/rank", "stability": "layers/stability", "outside": "layers/outside"}
_NAME = "events.out.tfevents.{:010d}.hpclr"
_PLUGIN = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))


class TensorBoard:
    """Writes one event file, which takes the place of those before it.

    A record says how its step went in the run as it is; what an attempt before had come to after the checkpoint is no
    longer among the records, so it is not in the new file either. The file begins with the mark of a new session, at
    which a TensorBoard that is running forgets what it has read.

    Args:
        directory: for event files; those of others in it are left alone.

    Raises:
        OSError: if it cannot be written; a file is then incomplete, and the next one takes its place.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        earlier = sorted(directory.glob(_NAME.replace("{:010d}", "*")))
        numbers = [int(path.name.split(".")[3]) for path in earlier if path.name.split(".")[3].isdecimal()]
        self._file = (directory / _NAME.format(max(numbers, default=0) + 1)).open("xb")
        self._writer = RecordWriter(self._file)
        self._maps = {name: HeatMap() for name in _TAGS}
        self._described: list[str] = []
        self._add(time.time(), 0, file_version="brain.Event:2")
        self._add(time.time(), 0, session_log=SessionLog(status=SessionLog.START))
        self._file.flush()  # so that there is always a file that can be read
        for path in earlier:
            path.unlink(missing_ok=True)

    def write(self, records: Sequence[Record]) -> None:
        """Writes their numbers; and pictures of all checks so far, if there is one among them."""
        for record in records:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(record).items()]
            if values:
                self._summarise(record, values)
        checks = [record for record in records if record["kind"] == "check"]
        for check in checks:
            self._remember(check)
        if checks:
            self._draw(checks[-1])
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _remember(self, check: Record) -> None:
        for name, heat_map in self._maps.items():
            if isinstance(check.get(name), dict):
                heat_map.add(check[name])

    def _draw(self, check: Record) -> None:
        known = {name: heat_map for name, heat_map in self._maps.items() if heat_map.low is not None}
        values = [_picture(_TAGS[name], heat_map) for name, heat_map in known.items()]
        layers = list(dict.fromkeys(layer for heat_map in self._maps.values() for layer in heat_map.layers))
        if layers != self._described:
            self._described = layers
            values.append(_text("layers/rows", _description(*self._maps.values())))
        self._summarise(check, values)

    def _summarise(self, record: Record, values: list[Any]) -> None:
        self._add(time_of(record) or time.time(), record["step"], summary=Summary(value=values))

    def _add(self, wall_time: float, step: int, **what: Any) -> None:
        self._writer.write(Event(wall_time=wall_time, step=step, **what).SerializeToString())


def _picture(tag: str, heat_map: HeatMap) -> Any:
    content, width, height = heat_map.png()
    image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=content)
    return Summary.Value(tag=tag, image=image)


def _text(tag: str, text: str) -> Any:
    return Summary.Value(tag=tag, metadata=_PLUGIN, tensor=TensorProto(dtype=DT_STRING, string_val=[text.encode()]))


def _description(*heat_maps: HeatMap) -> str:
    """What the pictures cannot say themselves, in Markdown."""
    layers = max((heat_map.layers for heat_map in heat_maps), key=len)
    return "\n".join(
        [
            "Columns are checks. Dark is the lowest value so far, yellow the highest, grey means unknown. "
            "Rows, from the top:",
            "",
            *(f"{number + 1}. `{name}`" for name, number in layers.items()),
        ]
    )
