"""Former place of the errors, until every module takes them from ``io``."""

from jigsaw_d2.io import JigsawError as JigsawError
