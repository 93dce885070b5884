"""Refusal detection in fourteen languages; captions that begin with text quoted from the image are exempt."""

from __future__ import annotations

import re
import unicodedata

_OPENING = 240  # characters within which a refusal is recognisable

#: Beginnings of refusals: an apology or "I cannot". English ones may continue in any way.
_ENGLISH = (
    r"i['’]?m (?:sorry|unable|not able|afraid i)|i am (?:sorry|unable|not able|afraid i)|sorry,"
    r"|i (?:cannot|can['’]?t|can not)\b|as an? (?:ai|language model)|i apologi[sz]e|unfortunately, i\b"
    r"|my apologies"
)
_GIVEN = r"(?:provided|attached|uploaded|included|shared|received|loaded|available)"
_SEEMS = r"(?:it (?:seems|looks|appears)[^.!?\n]{0,40}|unfortunately,? |sorry,? )"
_NO_IMAGE_EN = (
    rf"{_SEEMS}?(?:(?:there (?:is|was)|there['’]s) )?no (?:image|picture|photo)\w* "
    rf"(?:(?:was|were|is|has been|have been|seems to be) )?(?:actually |currently )?{_GIVEN}"
    rf"|{_SEEMS}?(?:i (?:don['’]?t|do not|did not|didn['’]?t) (?:see|have|receive)"
    r"|you (?:haven['’]?t|have not|didn['’]?t|did not|forgot to) (?:\w+ ){0,2}"
    r"(?:provide|attach|upload|include|share)\w*)"
    r" (?:any |an |the |your |access to (?:the |any )?)?(?:image|picture|photo)"
    rf"|{_SEEMS}(?:image|picture|photo)\w* (?:was|were|did|has|is) ?n[o'’]t (?:been )?(?:{_GIVEN}|load|upload|come)"
    r"|please (?:upload|provide|attach|share|send|re-?upload) (?:the|an|your|a) (?:\w+ )?(?:image|picture|photo)"
)

#: In other languages the verb that is refused must follow: help, see, describe, ...
_ZH_CANNOT = "无法|無法|不能|不可以|没有办法|沒有辦法|没办法|沒辦法|未能|拒绝|拒絕"
_ZH_HELP = (
    "协助|協助|帮|幫|识别|識別|辨认|辨認|提供|描述|查看|看到|看见|看見|处理|處理|回答|满足|滿足|完成|分析|判断|判斷|生成"
    "|讨论|討論|解读|解讀|访问|訪問|确认|確認"
)
_OTHERS = (
    # German
    r"(?:(?:(?:es )?tut mir (?:sehr )?leid|entschuldigung|leider)\b[^.!?\n]{0,60}?)?"
    r"\b(?:(?:kann|darf|möchte) ich|ich (?:kann|darf|möchte|bin))\b[^.!?\n]{0,80}\b(?:nicht|kein\w*)\b",
    r"als (?:ki|sprachmodell|ki-\w+)\b[^.!?\n]{0,60}\bkann ich\b",
    r"(?:es scheint|leider|es sieht)[^.!?\n]{0,40}\bkein (?:bild|foto)\b[^.!?\n]{0,40}"
    r"(?:hochgeladen|angehängt|beigefügt|übermittelt)",
    r"bitte (?:laden|senden|schicken|lade|sende|schicke) (?:sie |mir )*(?:das|ein) (?:bild|foto)",
    # French
    r"(?:(?:je suis )?(?:vraiment )?(?:désolée?|navrée?)|malheureusement|je regrette|je)\b[^.!?\n]{0,40}"
    r"\bje (?:ne (?:peux|puis|suis pas)|n['’](?:ai pas|arrive))",
    r"je ne (?:peux|puis|suis) pas (?:en mesure |capable )?(?:d['’e]? ?)?(?:vous )?"
    r"(?:aider|décrire|voir|identifier|répondre|analyser|fournir|traiter|visualiser)",
    r"il sembl\w+[^.!?\n]{0,30}aucune (?:image|photo)\b[^.!?\n]{0,30}(?:fourni|joint|transmis|envoy|reçu|télécharg)",
    # Spanish, Portuguese, Italian
    r"(?:lo siento|lo lamento|disculp\w+|perdón|lamentablemente|desafortunadamente)\b[^.!?\n]{0,40}"
    r"\bno (?:puedo|me es posible|soy capaz)",
    r"no puedo (?:ayudar|describir|ver|identificar|procesar|analizar|proporcionar|responder|cumplir)",
    r"parece que[^.!?\n]{0,30}(?:no (?:se )?ha\w*|ninguna (?:imagen|foto))[^.!?\n]{0,40}"
    r"(?:imagen|foto|adjunt|cargad|subid)",
    r"(?:desculp\w+|sinto muito|lamento|infelizmente)\b[^.!?\n]{0,40}\bnão (?:posso|consigo)",
    r"não (?:posso|consigo) (?:ajudar|descrever|ver|identificar|processar|analisar|fornecer|responder)",
    r"(?:mi dispiace|purtroppo|spiacente|mi scuso)\b[^.!?\n]{0,40}\bnon (?:posso|sono in grado|riesco)",
    r"non (?:posso|sono in grado di) "
    r"(?:aiutar\w*|descrivere|vedere|identificare|elaborare|analizzare|fornire|rispondere)",
    # Russian
    r"(?:извините|простите|к сожалению|прошу прощения|мне жаль)\b[^.!?\n]{0,40}\bя не (?:могу|вижу|умею|в состоянии)",
    r"я не могу (?:помочь|описать|видеть|определить|распознать|предоставить|обработать|ответить|выполнить)",
    # Chinese
    r"(?:您好|你好|非常|很|十分|真的|实在|實在)*[，,]?(?:抱歉|对不起|對不起|不好意思|遗憾|遺憾)[^。！？\n]{0,24}?"
    rf"(?:{_ZH_CANNOT})[^。！？\n]{{0,20}}?(?:{_ZH_HELP})",
    r"(?:作为|作為)(?:一个|一個|一名)?(?:人工智能|人工智慧|ai|语言模型|語言模型)[^。！？\n]{0,30}(?:无法|無法|不能)",
    rf"我(?:{_ZH_CANNOT})[^。！？\n]{{0,12}}?(?:{_ZH_HELP})",
    r"[^。！？\n]{0,12}(?:没有|沒有|未|并未|並未)(?:看到|收到|检测到|偵測到|上传|上傳|提供|附上)[^。！？\n]{0,8}"
    r"(?:图片|圖片|图像|圖像|照片|附件)[^。！？\n]{0,8}[，,。！\n][^。！？\n]{0,6}(?:请|請|您|你|重新|能否|可以)",
    # Japanese
    r"(?:大変|誠に)?(?:申し訳(?:ありません|ございません|ないです)|すみません|ごめんなさい|恐れ入ります|残念ながら)"
    r"[^。！？\n]{0,60}(?:できません|出来ません|できかねます|いたしかねます|お手伝い|お答え|わかりません|見ることが)",
    r"(?:画像|写真)(?:が|は|を)[^。！？\n]{0,12}(?:添付|アップロード|提供|送信)[^。！？\n]{0,12}"
    r"(?:ない|いません|ありません)[^。！？\n]{0,16}[。、]?[^。！？\n]{0,20}(?:ようです|もう一度|ください|$)",
    # Korean
    r"(?:정말 )?(?:죄송|미안)[^.!?\n]{0,60}(?:수 없|어렵|못|불가능)",
    r"(?:이미지|사진)(?:가|이|를)[^.!?\n]{0,16}(?:첨부|업로드|제공)[^.!?\n]{0,16}(?:않|없)",
    # Thai
    r"(?:ต้อง)?(?:ขออภัย|ขอโทษ|เสียใจ)[^\n]{0,30}?(?:ฉัน|ผม|ดิฉัน|เรา|ข้าพเจ้า)[^\n]{0,20}?ไม่สามารถ",
    r"(?:ฉัน|ผม|ดิฉัน)ไม่สามารถ(?:ช่วย|อธิบาย|ระบุ|ดู|มองเห็น|ให้|ตอบ|วิเคราะห์|บรรยาย)",
    # Arabic
    r"(?:عذر[^\s،]*|(?:أنا )?آسف[^\s،]*|أعتذر|للأسف)[^.!؟\n]{0,30}?(?:لا (?:أستطيع|يمكنني|أقدر)|لست قادر|لن أتمكن)",
    r"لا (?:أستطيع|يمكنني) (?:مساعد|وصف|تقديم|رؤية|التعرف|تحديد|المساعدة|تحليل)",
    # Vietnamese, Turkish
    r"(?:tôi )?(?:rất )?(?:xin lỗi|tiếc)[^.!?\n]{0,40}(?:tôi )?không thể",
    r"(?:üzgünüm|maalesef|özür dilerim|kusura bakmayın)[^.!?\n]{0,80}"
    r"(?:yardımcı olamam|edemem|edemiyorum|veremem|göremiyorum|tanımlayamam)",
)
_REFUSAL = re.compile(r"^\W*(?:" + "|".join((_ENGLISH, _NO_IMAGE_EN, *_OTHERS)) + ")", re.IGNORECASE)

#: Statements that the words before them are text in the image; "what is written" is not such a statement.
_WRITTEN = re.compile(
    r"(?<!what )(?<!which )(?<!that )(?<!who )\b(?:is|are|was|were|has been|appears?)(?: \w+ly| clearly| all)?"
    r" (?:hand)?-?(?:written|printed|painted|engraved|carved|scrawled|scribbled|sprayed|spelled|stencil\w*|embroidered"
    r"|stamped|chalked|lettered|tattooed|typed)\b|\bappears? (?:on|in|at|across|above|below|under) "
    r"|(?<!was )\b(?:steht|stehen) (?:in|auf|an|über|unter)\b|\b(?:ist|sind) (?:zu lesen|geschrieben|gedruckt|gemalt)\b"
    r"|\b(?:est|sont) (?:écrite?s?|inscrite?s?|imprimée?s?|peinte?s?|affichée?s?)\b|\b(?:lit-on|peut-on lire)\b"
    r"|\b(?:está|están|aparece) (?:escrit[oa]s?|impres[oa]s?|pintad[oa]s?)\b|\b(?:se lee|se puede leer)\b"
    r"|\b(?:está|estão) (?:escrit[oa]s?|impress[oa]s?|pintad[oa]s?)\b|\b(?:è|sono) (?:scritt[oaie]|stampat[oaie])\b"
    r"|(?:写着|寫著|印着|印著|写在|寫在|印在|写有|字样|字樣|标语|標語|的牌子|的告示|的招牌)"
    r"|(?:と(?:書かれ|書いて|印刷され|記され|表示され)|という文字|の文字が)|라고 (?:적혀|쓰여|인쇄)"
    r"|(?:написано|надпись|напечатано)"
    r"|(?:เขียนไว้|เขียนอยู่|พิมพ์อยู่|เขียนว่า)|(?:مكتوب|مكتوبة|مطبوع|مطبوعة)",
    re.IGNORECASE,
)
_QUOTES = {'"': '"', "“": "”", "„": "“", "«": "»", "「": "」", "『": "』", "‘": "’", "'": "'", "‹": "›", "»": "«"}
_SENTENCE_END = re.compile(r"[.!?。！？؟]+(?=\s|$|[^\W\d_])|\n")


def is_refusal(text: str) -> bool:
    """True if a text declines to describe the image, or says that there is none."""
    opening = unicodedata.normalize("NFC", text.strip())[:_OPENING]
    return _REFUSAL.match(opening) is not None and not begins_with_inscription(opening)


def begins_with_inscription(text: str) -> bool:
    """True if a text begins with text from the image: in quotation marks, or followed by "... is written"."""
    return _quotes_at_the_start(text) or _WRITTEN.search(_SENTENCE_END.split(text, maxsplit=1)[0]) is not None


def _quotes_at_the_start(text: str) -> bool:
    """True if the text begins with a quotation and continues after it."""
    closing = _QUOTES.get(text[:1])
    if closing is None:
        return False
    for end in re.finditer(re.escape(closing), text[1:]):
        rest = text[1 + end.end() :]
        if closing not in "'’" or not rest[:1].isalnum():  # an apostrophe within a word is not a closing quote
            return any(c.isalnum() for c in rest)
    return False
