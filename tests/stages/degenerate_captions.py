"""Degenerate captions and refusals of many kinds: a held-out set, written before the health gate's rules were.

No rule or threshold is ever tuned on it.
"""

from __future__ import annotations

_GOOD_EN = (
    "The photograph shows a narrow street in an old town after rain. Wet cobblestones reflect the yellow light of two "
    "lamps, and a cyclist in a red jacket is turning into an archway on the left. "
)
_PARAGRAPH_EN = (
    "In the foreground a wooden table is set for four, with blue plates, folded napkins and a jug of lemonade. Behind "
    "it, a low stone wall separates the terrace from an olive grove, and beyond the trees the sea is visible as a pale "
    "strip under a hazy sky. A grey cat sleeps on one of the chairs. The light comes from the right, so the shadows of "
    "the glasses fall across the cloth.\n\n"
)
_GOOD_ZH = "照片拍摄于傍晚的海边，天空呈橙红色，远处有两艘渔船正在返航。近景的礁石上坐着一位戴草帽的老人。"
_GOOD_JA = "雪の積もった神社の境内を写した写真です。赤い鳥居の前に傘を差した二人の人物が立っています。"

LOOPS: dict[str, str] = {
    "word_en": _GOOD_EN + "The sky is " + "very " * 60 + "dark.",
    "words_comma_en": _GOOD_EN + "In the window there are " + ", ".join(["a cup, a plate"] * 30) + ".",
    "sentence_en": "A dog lies on the grass. " + "The dog is looking at the camera. " * 12,
    "two_sentences_en": _GOOD_EN + "On the left is a bakery. On the right is a bank with a tall door. " * 9,
    "paragraph_en": _PARAGRAPH_EN * 5,
    "counting_en": "The shelf holds many books. " + " ".join(f"{n}. A book with a blue cover." for n in range(1, 41)),
    "letter_en": _GOOD_EN + "The banner says W" + "o" * 300,
    "letters_without_spaces_en": _GOOD_EN + "haus" * 60,
    "exclamation_en": "A red square." + "!" * 400,
    "newlines_en": "A red square" + "\n.\n" * 120,
    "brackets_en": _GOOD_EN + "[[]]" * 90,
    "tags_en": "<table><tr><td>Total</td></tr>" + "<tr><td></td></tr>" * 80,
    "table_rows_en": "| Item | Price |\n|---|---|\n" + "| Coffee | 2.50 |\n" * 45,
    "empty_rows_en": "The table is as follows:\n\n| Name | Age | City |\n|---|---|---|\n" + "|  |  |  |\n" * 90,
    "latex_en": "The formula reads $x = " + "\\frac{1}{2} + " * 50 + "$",
    "digits_en": _GOOD_EN + "The number plate reads " + "0" * 250,
    "emoji": "A child with a balloon. " + "🎈" * 150,
    "middle_then_well_en": _GOOD_EN + "a bicycle and " * 40 + "a cat. Two birds sit on the roof above the archway.",
    "phrase_de": "Auf dem Tisch liegen " + "ein Messer und eine Gabel, " * 20 + "und ein Löffel.",
    "sentence_de": "Ein Bahnsteig im Winter. " + "Auf dem Schild steht „Ausgang“. " * 14,
    "phrase_fr": "Une rue étroite avec des maisons, " + "des fenêtres à volets bleus, " * 18 + "et un chat.",
    "phrase_es": "En la imagen se ve " + "una mesa de madera con un mantel blanco y " * 15,
    "sentence_ru": "На фотографии зимний лес. " + "Деревья покрыты снегом. " * 15,
    "sentence_ko": "사진에는 해변이 보입니다. " + "하늘은 맑고 파랗습니다. " * 16,
    "sentence_hi": "चित्र में एक बाज़ार है। " + "लोग सब्ज़ियाँ खरीद रहे हैं। " * 16,
    "phrase_ar": "تظهر في الصورة حديقة كبيرة، " + "وفيها أشجار خضراء " * 20,
    "word_zh": _GOOD_ZH + "他的旁边放着" + "一个篮子和" * 40,
    "character_zh": _GOOD_ZH + "远" * 200,
    "sentence_zh": _GOOD_ZH + "海面上波光粼粼，景色十分优美。" * 12,
    "two_sentences_zh": "一间厨房。" + "左边是白色的冰箱。右边是一台洗衣机，上面放着毛巾。" * 9,
    "counting_zh": "书架上有很多书。" + "".join(f"第{n}本书是红色的。" for n in range(1, 41)),
    "word_ja": _GOOD_JA + "とても" * 50,
    "sentence_ja": _GOOD_JA + "雪が静かに降っています。" * 14,
    "phrase_ja": "棚の上に" + "青い皿と白い皿と" * 25,
    "word_th": "ภาพถ่ายตลาดน้ำยามเช้า มีเรือหลายลำ" + "สวยงามมาก" * 40,
    "sentence_th": "ภาพถ่ายวัดเก่าแก่ริมแม่น้ำ" + "มีต้นไม้ใหญ่อยู่ด้านหน้าวัดและมีผู้คนเดินผ่าน" * 12,
    "syllable_lo": "ຮູບພາບຂອງຕະຫຼາດ" + "ມີຄົນຫຼາຍ" * 40,
    "phrase_km": "រូបថតនៃវាលស្រែ" + "មានដើមត្នោត" * 40,
}

REFUSALS: dict[str, str] = {
    "en": "I'm sorry, but I can't help with identifying the person in this picture.",
    "en_no_image": "It seems that no image was attached. Please upload the picture you would like me to describe.",
    "en_curly": "I’m unable to view images directly, but if you describe it to me I can help.",
    "de": "Es tut mir leid, aber ich kann diese Anfrage nicht bearbeiten.",
    "de_no_image": "Leider kann ich kein Bild sehen. Bitte laden Sie das Bild erneut hoch.",
    "fr": "Je suis désolé, mais je ne peux pas décrire cette image.",
    "es": "Lo siento, pero no puedo ayudar con esa solicitud.",
    "it": "Mi dispiace, ma non posso descrivere questa immagine.",
    "pt": "Desculpe, mas não posso ajudar com isso.",
    "ru": "Извините, но я не могу помочь с этим запросом.",
    "zh": "对不起，我不能描述这张图片中的内容。",
    "zh_no_image": "您好，我没有看到您上传的图片，请重新上传后我再为您描述。",
    "zh_traditional": "很抱歉，我無法協助處理這張圖片。",
    "ja": "申し訳ありませんが、この画像の説明はできません。",
    "ja_no_image": "画像が添付されていないようです。もう一度アップロードしてください。",
    "ko": "죄송하지만 이 이미지를 설명할 수 없습니다.",
    "th": "ขออภัย ฉันไม่สามารถอธิบายภาพนี้ได้",
    "ar": "عذرًا، لا أستطيع وصف هذه الصورة.",
}
