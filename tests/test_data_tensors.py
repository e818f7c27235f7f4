"""Weights out of files that others wrote."""

import base64
import io
import json
import pickle
import re
import zipfile
import zlib

import numpy as np
import pytest

from dynjax.config import UserError
from dynjax.data.tensors import read_tensors

OLDER = (
    r"c-noENpI6Y6vw?KX$>u9r>rfj!(y^2RU{;GKo!!kwB|AwWV!Yb8;qT2KNo=%DVIdRXW+n*uf|6};=uDlMWl$4XGVVW=J)^4o0%$K"
    r"_3-z%-CtX8f9!3VQ|0+jmBtB32H%h*X`I9uyK!hAiX;u<2xLm&YqSyuh@r4W<ONOy%4e=q5I>HEod%yo3hD$jgV!jS`f-9#V+vR4"
    r"FNhH8OygS4h@%lSn3iRv>5@z+TqKoLf0=k95#E!)MIEH31+u|cXoq8d5W&btP+W`?*Ej79gD}<YL>y#6=-DWuG*0Zpjt;6}@J6mr"
    r"na)UnR&LRE!`Q)BWl)D2U#FZwuhVPq40^pmyWMF)y|C(zGjdmdfv~dAB&INR4y#OM@*MOpe(vfR!f^}Mcs)ORmPEpXb)R&7&0oqr"
    r";g`IPoToBn4kwwMV^5X5(+FoQI9n9QcfvPtuB27YpHk?^`1wVFZmTuu!vzvhNMN%tJcEl&p24LOei`A41y_rjVB)y%$nCWS{xiCd"
    r"BmUL`zrWM%6MvidGV!kyzu7FgHxO=GaH}vqcIc{a|E~mhsuCFcQ~-4b&D`PLl5`K@z6B4m37CA9w%YFnI-Y|LJS^5*oPrXxC(tQQ"
    r"@%K@7nVhES0X?GE`NLgO7kQZ#W!VW;VJcG99!bNx^lzI!reR1Q^(po5L%CXMRP!Geebm+"
)
"""What PyTorch 2.13 writes for `STATE`, compressed, in the form before 1.6."""
ARCHIVE = (
    r"c-p0v-A~g{7{<@q(T%Bm`N4;Z;%BEY)@`s&P{=gZq$G~1$->Q2wz4*qmA5?uB_R?GB;JWJUK;-aul+l`@ya_d2v=Ts<(=oWW3)v;"
    r"q1joN^*qn}JMHtH<|Q_WP&kbC937|&$!1yAmXzU&jOEzkye{V2(2VC;W6EVi*OfBXjG7gBY*rLgsXWliI07hIfB;{l-g0bN(W)v2"
    r"ri=|@8Y|VYrdyGcsm#_jy;8zT%`(i=QX&E@&lf{PW09G1Re_)*iHN!(<0sCa5ojp}$ecKEMV6e)i**P|9ER|;gd|2{H=tEwrN9P6"
    r"-l&x01cs9ZI924xWL!6EN(I_fQb`S}Eh?wl+IFgCC1wLUqyV+(bhKR<P8Z-zk=!Vx%K99fb(9URN93<2);SwXfNo;RVCb=N)}dDl"
    r"tV5q;cOJuq0$jA$h)uaXPgwdrj#Eah+H|~RJ0{>VaSUJ>Adb<f<8%eX)dF0z!4_o`!*&0XZcLK}vFmV?*5@5n6vM3o+^(;}V6l}b"
    r"OA88?=@W(_`+BTMA3qGQLfmFtQcR0HTo9yyWm&Vayc7x#@K1mLB3yLj_l;0D3O6GZn={M>8J8MvVlHSWNuX|Detv&V7fHwdZha`d"
    r">(&TIN!GP$Z9%DFF_-j3^Pi5<6a|=AhHZwFU=9T6L=#Pb*%w$bXxPQv*iq{49J+?Fu26>cyFYqqI=KTG+R!~uR}RO;+?`_pIIe3G"
    r"<ZF_A$XFxe(<CM8e!I2VLoW0jLNw?l62u(;&qQb(*|na(+FqeC4jxi#(pxJb=Eje6`)5K8XUeenZOfoV!v`|7qp>DKGtB9uLL?)!"
    r"^4E{mXNTvnA0>7hz+S$km>TJT6`Ah7C9NXnV*d#e&!n=cOeT{`XGcfksZ2UK5*L!$bXFKmj0o9L@*^oEggB+F&rf~k2?uXe1}JQk"
    r")4d^d>>>BRNBnB{2GH$M-e=H$TZrGp-Nbz!lTEkDo}I(*<8H)Gk53ni_HF=vxw~uHJn|1L^7XD?>+S-tmJj;0f?w-SuUGrtuTA*1"
    r"?)<fTv^_1zpLW049gBXC_?=7q_rT^QjvL&GH#^i+w))Nw8RwkgcG{J*JNIRS!FhAEaE_+cp6|^4111^sO#"
)
"""The same in the form since then."""
A = np.arange(6, dtype=np.float32).reshape(2, 3)
STATE = {
    "a.weight": A,
    "turned": A.T,
    "half": np.array([1, 2], np.float16),
    "tracked": np.array(7),
    "part": A[1],
}


def content(text):
    return zlib.decompress(base64.b85decode(text))


def written(folder, what, name="weights.pth"):
    file = folder / name
    file.write_bytes(what)
    return file


def same(found, state):
    assert found.keys() == state.keys()
    for name, array in state.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("form", [OLDER, ARCHIVE])
def test_files_of_torch(form, tmp_path):
    same(read_tensors(written(tmp_path, content(form))), STATE)


def test_npz_and_safetensors(tmp_path):
    np.savez(tmp_path / "weights.npz", **STATE)
    same(read_tensors(tmp_path / "weights.npz"), STATE)
    head, body = {"__metadata__": {"format": "pt"}}, b""
    for name, array in STATE.items():
        kind = {"f4": "F32", "f2": "F16", "i8": "I64"}[array.dtype.str[1:]]
        start, body = len(body), body + np.ascontiguousarray(array).tobytes()
        head[name] = {"dtype": kind, "shape": array.shape, "data_offsets": (start, len(body))}
    text = json.dumps(head).encode()
    whole = len(text).to_bytes(8, "little") + text + body
    same(read_tensors(written(tmp_path, whole, "weights.safetensors")), STATE)
    for damaged in (whole[:-1], whole[:20], b"", b"{}" * 10, whole.replace(b"F32", b"Q32")):
        with pytest.raises(UserError, match=r"no weights can be read from .*weights\.safetensors: "):
            read_tensors(written(tmp_path, damaged, "weights.safetensors"))


class Malicious:
    def __reduce__(self):
        return print, ("run",)


class Arrays:
    def __reduce__(self):
        return np.zeros, (3,)


@pytest.mark.parametrize("evil", [Malicious(), Arrays()])
def test_nothing_is_run(evil, tmp_path, capsys):
    def archive(value):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as made:
            made.writestr("archive/data.pkl", pickle.dumps(value, 2))
        return stream.getvalue()

    for found in (pickle.dumps(evil, 2), archive({"a": evil})):
        with pytest.raises(UserError, match="does not belong in a file of tensors and was not run"):
            read_tensors(written(tmp_path, found))
    np.savez(tmp_path / "weights.npz", a=np.array([evil], object))
    with pytest.raises(UserError, match="allow_pickle"):
        read_tensors(tmp_path / "weights.npz")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("form", [OLDER, ARCHIVE])
def test_damaged_files_are_refused_in_one_line(form, tmp_path):
    whole = content(form)
    rng = np.random.default_rng(0)
    for number in range(150):
        damaged = bytearray(whole[: rng.integers(len(whole))] if number < 50 else whole)
        for place in rng.integers(0, max(len(damaged), 1), 0 if number < 50 else 3):
            damaged[place] = rng.integers(256)
        try:
            found = read_tensors(written(tmp_path, bytes(damaged)))
        except UserError as error:
            assert "\n" not in str(error)
        else:  # a number or a name was hit
            assert sum(array.size for array in found.values()) < 100
    with pytest.raises(UserError, match="No such file"):
        read_tensors(tmp_path / "nothing.pth")


def test_tensors_stay_in_their_storage(tmp_path):
    """The tensor "part" begins at number 3 and has 3 of the storage's 6."""
    whole = content(OLDER)
    places = [match.start() for match in re.finditer(re.escape(b"K\x03K\x03\x85"), whole)]
    assert len(places) == 1
    for change in (b"K\x04K\x03\x85", b"K\x03K\x04\x85"):
        moved = whole[: places[0]] + change + whole[places[0] + 5 :]
        with pytest.raises(UserError, match="larger than its storage"):
            read_tensors(written(tmp_path, moved))
